"""The page pool's books, against a plain model and by hand."""

import random

import pytest

from device_runtime.engine.page_pool import PagePool, page_digest, root_digest
from device_runtime.errors import InternalError

ROOT = root_digest("test")


def fill(pool: PagePool, token_ids: list[int], root: bytes = ROOT) -> list[int]:
    """Allocate and register the full pages of a sequence, as a prefill does."""
    pages = []
    parent = root
    for start in range(0, len(token_ids), pool.page_size):
        page = pool.allocate()
        assert page is not None
        pages.append(page)
        tokens = token_ids[start : start + pool.page_size]
        if len(tokens) == pool.page_size:
            parent = page_digest(parent, tokens)
            pool.register(page, parent)
    return pages


def test_every_page_is_given_once_and_then_none() -> None:
    pool = PagePool(3, 4)
    assert sorted(p for p in (pool.allocate(), pool.allocate(), pool.allocate())) == [0, 1, 2]
    assert pool.allocate() is None
    pool.check_integrity({0: 1, 1: 1, 2: 1})


def test_a_released_prefix_is_found_again_and_costs_no_new_page() -> None:
    pool = PagePool(8, 4)
    tokens = list(range(10))
    pages = fill(pool, tokens)
    pool.release(reversed(pages))
    assert pool.num_cached == 2  # tokens 0-3 and 4-7; 8 and 9 do not fill a page
    found = pool.find_prefix(tokens, ROOT, max_tokens=9)
    assert found == pages[:2]
    pool.check_integrity({pages[0]: 1, pages[1]: 1})


def test_the_prefix_found_never_passes_max_tokens() -> None:
    pool = PagePool(8, 4)
    tokens = list(range(8))
    pages = fill(pool, tokens)
    assert pool.find_prefix(tokens, ROOT, max_tokens=7) == pages[:1]
    assert pool.find_prefix(tokens, ROOT, max_tokens=8) == pages
    assert pool.find_prefix(tokens, ROOT, max_tokens=3) == []


def test_a_page_is_found_only_after_the_same_pages_before_it() -> None:
    pool = PagePool(8, 4)
    fill(pool, [1, 2, 3, 4, 5, 6, 7, 8])
    assert pool.find_prefix([9, 9, 9, 9, 5, 6, 7, 8], ROOT, max_tokens=8) == []
    assert len(pool.find_prefix([1, 2, 3, 4, 9, 9, 9, 9], ROOT, max_tokens=8)) == 1


def test_another_root_shares_nothing() -> None:
    pool = PagePool(8, 4)
    fill(pool, [1, 2, 3, 4])
    assert pool.find_prefix([1, 2, 3, 4], root_digest("other theta"), max_tokens=4) == []


def test_cached_pages_go_least_recently_used_first_and_only_when_none_is_free() -> None:
    pool = PagePool(3, 2)
    first, second = fill(pool, [1, 2]), fill(pool, [3, 4])
    pool.release(first)
    pool.release(second)
    assert pool.allocate() not in first + second  # the one free page
    assert pool.find_prefix([1, 2], ROOT, max_tokens=2) == first  # now second is the oldest
    pool.release(first)
    assert pool.allocate() == second[0]
    assert pool.find_prefix([3, 4], ROOT, max_tokens=2) == []
    assert pool.find_prefix([1, 2], ROOT, max_tokens=2) == first


def test_two_holders_share_a_page_until_both_let_go() -> None:
    pool = PagePool(2, 2)
    pages = fill(pool, [1, 2])
    assert pool.find_prefix([1, 2, 3], ROOT, max_tokens=2) == pages
    pool.release(pages)
    assert pool.num_available == 1
    pool.release(pages)
    assert pool.num_available == 2


def test_a_registered_or_shared_page_is_not_writable() -> None:
    pool = PagePool(2, 2)
    page = pool.allocate()
    assert page is not None
    assert pool.is_writable(page)
    pool.retain([page])
    assert not pool.is_writable(page)
    pool.release([page])
    pool.register(page, page_digest(ROOT, [1, 2]))
    assert not pool.is_writable(page)


def test_the_second_page_with_the_same_tokens_stays_unfindable() -> None:
    pool = PagePool(3, 2)
    first, second = fill(pool, [1, 2]), fill(pool, [1, 2])
    pool.release(second)
    assert pool.num_cached == 0
    pool.release(first)
    assert pool.num_cached == 1
    pool.check_integrity({})


def test_dropping_cached_pages_frees_them_and_reports_them() -> None:
    pool = PagePool(2, 2)
    pages = fill(pool, [1, 2])
    pool.release(pages)
    assert pool.take_released() == []
    pool.drop_cached()
    assert pool.take_released() == pages
    assert pool.find_prefix([1, 2], ROOT, max_tokens=2) == []


def test_releasing_a_page_nobody_holds_is_an_error() -> None:
    with pytest.raises(InternalError, match="page 1 is released but has no holder"):
        PagePool(2, 2).release([1])


def test_integrity_sees_a_page_in_two_states() -> None:
    pool = PagePool(2, 2)
    pool._free.append(0)
    with pytest.raises(InternalError, match="do not make 2"):
        pool.check_integrity()
    pool = PagePool(2, 2)
    pool._cached[0] = None
    pool._free.remove(1)
    with pytest.raises(InternalError, match=r"pages \[0\] are in two states"):
        pool.check_integrity()


def test_integrity_sees_broken_digests_and_wrong_holders() -> None:
    pool = PagePool(2, 2)
    pool._digest_of[0] = b"x"
    with pytest.raises(InternalError, match="free page has one"):
        pool.check_integrity()
    pool = PagePool(2, 2)
    page = pool.allocate()
    assert page is not None
    pool._digest_of[page] = b"x"
    with pytest.raises(InternalError, match="do not map onto each other"):
        pool.check_integrity()
    del pool._digest_of[page]
    with pytest.raises(InternalError, match="differ between pool and holders"):
        pool.check_integrity({page: 2})


def test_the_books_hold_after_thousands_of_random_operations() -> None:
    rng = random.Random(7)
    pool = PagePool(24, 4)
    held: list[list[int]] = []
    for step in range(6000):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 25))]
        if rng.random() < 0.55:
            pages = pool.find_prefix(tokens, ROOT, max_tokens=len(tokens) - 1)
            parent = ROOT
            for index in range(-(-len(tokens) // 4)):
                content = tokens[4 * index : 4 * index + 4]
                if index >= len(pages):
                    page = pool.allocate()
                    if page is None:
                        break
                    pages.append(page)
                if len(content) == 4:
                    parent = page_digest(parent, content)
                    pool.register(pages[index], parent)
            held.append(pages)
        elif held:
            pool.release(reversed(held.pop(rng.randrange(len(held)))))
        if step % 50 == 0:
            counts: dict[int, int] = {}
            for pages in held:
                for page in pages:
                    counts[page] = counts.get(page, 0) + 1
            pool.check_integrity(counts)
    for pages in held:
        pool.release(reversed(pages))
    pool.check_integrity({})
    assert pool.num_available == 24
