"""Embeddings, angles and query scales on the GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from device_launch import ArrayLaunch, device_launch
from sampling_cases import check_embedding


@pytest.fixture(scope="module")
def launch() -> Iterator[ArrayLaunch]:
    with device_launch("embedding") as launch:
        yield launch


@pytest.mark.parametrize("is_half", [True, False])
def test_embeddings_angles_and_query_scales(launch: ArrayLaunch, is_half: bool) -> None:
    check_embedding(launch, is_half=is_half)
