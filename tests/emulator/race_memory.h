// Memory, threads and launches as the race checker sees them; a part of race_check.cpp.
//
// Memory is watched in words of 4 bytes, single bytes where accesses are smaller. A word keeps its
// last write and the reads since; those of a warp or block that nothing orders are kept as one.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <deque>
#include <memory>
#include <set>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace {

constexpr int kWarp = 32;
constexpr size_t kMaxReports = 64;

enum Level : uint8_t { kNobody, kOneThread, kOneWarp, kOneBlock };

// Who did it: `thread` (or others of its warp or block too), before it came to these turns.
struct Record {
  uint32_t launch, thread, warp_turn, block_turn, clock;
  Level level;
  bool is_write, is_atomic, is_asynchronous, is_copying;
  const void* where;
};

struct Cell {
  uint32_t stamp;  // of the region, when it was last used
  bool is_split;   // an access was smaller: `bytes` count
  Record write, read;
  std::vector<Record>* more;  // what has no place above
  Cell* bytes;                // [4]
};

struct Region {
  uintptr_t begin, end;
  std::string name;
  bool is_shared;
  uint32_t stamp;
  Cell* cells;
  size_t cell_bytes;
  std::deque<std::vector<Record>> lists;
  std::deque<std::array<Cell, 4>> splits;
};

// How far others are known to have come: thread, warp or block (by kind) and its turn.
using Known = std::unordered_map<uint64_t, uint32_t>;
enum Kind : uint64_t { kThreadKind = 1ull << 60, kWarpKind = 2ull << 60, kBlockKind = 3ull << 60 };

struct Thread {
  uint32_t id, warp_turn, block_turn, clock;
  bool has_waited;
  std::shared_ptr<const Known> known;
};

// Launches that are complete: all up to a number, and some more.
struct Complete {
  uint32_t up_to = 0;
  std::vector<uint32_t> more;
  bool has(uint32_t launch) const {
    return launch <= up_to || std::find(more.begin(), more.end(), launch) != more.end();
  }
  void add(uint32_t launch) {
    if (launch == up_to + 1)
      up_to = launch;
    else
      more.push_back(launch);
  }
};

struct Launch {
  uint32_t number = 0;
  bool is_programmatic = false, has_waited = false;
  Complete at_start, at_wait;
};

struct Report {
  std::string what, region;
  size_t offset;
  Record earlier, later;
};

// Two writes; a race if the second has changed the value when its thread goes on.
struct Doubt {
  Report report;
  const void* address;
  size_t bytes;
  uint32_t value;
};

std::vector<std::unique_ptr<Region>> regions;
uintptr_t lowest = UINTPTR_MAX, highest = 0;
Region* last_region = nullptr;
std::vector<std::string> names{"the host"};  // of launches
Launch launch;
Complete complete;      // when all that was launched is
bool is_after_kernel = false;
std::vector<Thread> threads;
Thread* now = nullptr;
unsigned block_threads = 1;
uint32_t first_thread = 0;
bool is_mute = false;
std::unordered_map<uintptr_t, Known> released;  // by the address of an atomic
std::vector<Report> reports;
std::vector<Doubt> doubts;
std::set<std::tuple<const void*, const void*, std::string>> reported;
std::string text;

uint32_t block_of(const Record& record) { return record.thread / block_threads; }

Region* find(uintptr_t address) {
  if (address < lowest || address >= highest) return nullptr;
  if (last_region && address >= last_region->begin && address < last_region->end)
    return last_region;
  for (const auto& region : regions)
    if (address >= region->begin && address < region->end) return last_region = region.get();
  return nullptr;
}

bool is_known(uint64_t who, uint32_t turn) {
  const auto found = now->known->find(who);
  return found != now->known->end() && found->second > turn;
}

// Whether what was recorded happened before what the current thread does.
bool is_before(const Record& old) {
  if (old.launch != launch.number)
    return launch.at_start.has(old.launch) || (now->has_waited && launch.at_wait.has(old.launch));
  if (old.is_copying) return false;
  if (old.level == kOneThread && old.thread == now->id) return true;
  if (old.level <= kOneWarp && old.thread / kWarp == now->id / kWarp &&
      old.warp_turn < now->warp_turn)
    return true;
  if (block_of(old) == now->id / block_threads && old.block_turn < now->block_turn) return true;
  if (!now->known) return false;
  return is_known(kBlockKind | block_of(old), old.block_turn) ||
         (old.level <= kOneWarp && is_known(kWarpKind | old.thread / kWarp, old.warp_turn)) ||
         (old.level == kOneThread && is_known(kThreadKind | old.thread, old.clock));
}

// Makes one record of two that nothing orders, where they are of one block.
bool merge(Record& old, const Record& add) {
  if (old.launch != add.launch || block_of(old) != block_of(add) || old.is_copying) return false;
  Level level = kOneThread;
  if (old.thread / kWarp != add.thread / kWarp)
    level = kOneBlock;
  else if (old.thread != add.thread)
    level = kOneWarp;
  level = std::max(level, old.level);
  const bool is_atomic = old.is_atomic && add.is_atomic;
  const uint32_t turns[3] = {std::max(old.warp_turn, add.warp_turn),
                             std::max(old.block_turn, add.block_turn),
                             std::max(old.clock, add.clock)};
  old = add;
  old.level = level;
  old.is_atomic = is_atomic;
  old.warp_turn = turns[0];
  old.block_turn = turns[1];
  old.clock = turns[2];
  return true;
}

void report(const Report& found) {
  if (reports.size() < kMaxReports &&
      reported.emplace(found.earlier.where, found.later.where, found.what).second)
    reports.push_back(found);
}

void settle_doubts() {
  for (const Doubt& doubt : doubts)
    if (memcmp(doubt.address, &doubt.value, doubt.bytes) != 0) report(doubt.report);
  doubts.clear();
}

void check(const Region& region, size_t offset, size_t bytes, const Record& old,
           const Record& mine) {
  if (old.level == kNobody || (!old.is_write && !mine.is_write)) return;
  if (old.is_atomic && mine.is_atomic) return;
  Report found{"has a race", region.name, offset, old, mine};
  const bool is_same_launch = old.launch == launch.number;
  if (old.is_copying && is_same_launch) {
    found.what = "is used before its asynchronous copy was waited for";
    report(found);
  } else if (!is_before(old)) {
    if (!is_same_launch) found.what = "has a race between two kernels";
    const bool is_plain = !old.is_atomic && !mine.is_atomic && !mine.is_asynchronous;
    if (old.is_write && mine.is_write && is_plain && is_same_launch) {
      doubts.push_back({found, reinterpret_cast<const void*>(region.begin + offset), bytes, 0});
      memcpy(&doubts.back().value, doubts.back().address, bytes);
    } else {
      report(found);
    }
  }
}

void keep(Cell& cell, Region& region, const Record& record) {
  if (!cell.more) cell.more = &region.lists.emplace_back();
  for (Record& old : *cell.more)
    if (old.is_write == record.is_write && merge(old, record)) return;
  cell.more->push_back(record);
}

void use_cell(Cell& cell, Region& region, size_t offset, size_t bytes, const Record& mine) {
  check(region, offset, bytes, cell.write, mine);
  if (mine.is_write) check(region, offset, bytes, cell.read, mine);
  if (cell.more) {
    auto& more = *cell.more;
    for (const Record& old : more) check(region, offset, bytes, old, mine);
    more.erase(std::remove_if(more.begin(), more.end(), is_before), more.end());
  }
  if (mine.is_write && !mine.is_atomic) cell.read.level = kNobody;  // before it, or told
  Record& place = mine.is_write ? cell.write : cell.read;
  if (place.level != kNobody && !is_before(place)) {
    if (merge(place, mine)) return;
    keep(cell, region, place);
  }
  place = mine;
}

Cell& cell_of(Region& region, size_t index) {
  Cell& cell = region.cells[index];
  if (cell.stamp != region.stamp) {
    if (cell.more) cell.more->clear();
    cell.write.level = cell.read.level = kNobody;
    cell.is_split = false;
    cell.stamp = region.stamp;
  }
  return cell;
}

void split(Cell& cell, Region& region) {
  if (!cell.bytes) cell.bytes = region.splits.emplace_back().data();
  for (int i = 0; i < 4; ++i) {
    Cell& byte = cell.bytes[i];
    byte.write = cell.write;
    byte.read = cell.read;
    if (byte.more) byte.more->clear();
    if (cell.more)
      for (const Record& old : *cell.more) keep(byte, region, old);
  }
  cell.is_split = true;
}

// Calls f(cell, offset, bytes) for each word or byte of a range.
template <typename F>
void for_cells(Region& region, size_t offset, size_t bytes, F f) {
  const size_t end = std::min(offset + bytes, static_cast<size_t>(region.end - region.begin));
  while (offset < end) {
    Cell& cell = cell_of(region, offset / 4);
    const size_t in_word = offset % 4, part = std::min(4 - in_word, end - offset);
    if (part == 4 && !cell.is_split) {
      f(cell, offset, 4);
    } else {
      if (!cell.is_split) split(cell, region);
      for (size_t i = 0; i < part; ++i) f(cell.bytes[in_word + i], offset + i, 1);
    }
    offset += part;
  }
}

enum Way { kPlain, kAtomic, kAsynchronous };

Record record_of(bool is_write, Way way, const void* where) {
  Record record{launch.number, now->id, now->warp_turn, now->block_turn, now->clock, kOneThread};
  record.is_write = is_write;
  record.is_atomic = way == kAtomic;
  record.is_asynchronous = way == kAsynchronous;
  record.where = where;
  return record;
}

void use(uintptr_t address, size_t bytes, bool is_write, Way way, const void* where) {
  if (!doubts.empty()) settle_doubts();
  Region* const region = find(address);
  if (!region) return;
  const Record mine = record_of(is_write, way, where);
  if (is_write && !region->is_shared && launch.is_programmatic && !now->has_waited)
    report({"is written before the kernel waits for those before it", region->name,
            address - region->begin, mine, mine});
  for_cells(*region, address - region->begin, bytes, [&](Cell& cell, size_t offset, size_t width) {
    use_cell(cell, *region, offset, width, mine);
  });
}

void see(const void* address, size_t bytes, bool is_write, const void* where) {
  if (now && !is_mute) use(reinterpret_cast<uintptr_t>(address), bytes, is_write, kPlain, where);
}

void take_in(Known& known, const Known& other) {
  for (const auto& [who, turn] : other) {
    uint32_t& own = known[who];
    own = std::max(own, turn);
  }
}

void add_region(const void* base, size_t bytes, const char* name, bool is_shared) {
  auto region = std::make_unique<Region>();
  region->begin = reinterpret_cast<uintptr_t>(base);
  region->end = region->begin + bytes;
  region->name = name;
  region->is_shared = is_shared;
  region->stamp = 1;
  region->cell_bytes = (bytes / 4 + 1) * sizeof(Cell);
  // Zeros, where they are touched at all.
  region->cells = static_cast<Cell*>(mmap(nullptr, region->cell_bytes, PROT_READ | PROT_WRITE,
                                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  lowest = std::min(lowest, region->begin);
  highest = std::max(highest, region->end);
  regions.push_back(std::move(region));
}

template <typename F>
void drop_regions(F is_dropped) {
  last_region = nullptr;
  const auto from = std::stable_partition(regions.begin(), regions.end(),
                                          [&](const auto& region) { return !is_dropped(*region); });
  for (auto region = from; region != regions.end(); ++region)
    munmap((*region)->cells, (*region)->cell_bytes);
  regions.erase(from, regions.end());
}

// Threads [first, first + count) of the cluster have met.
void join(int first, int count) {
  bool has_waited = false, has_known = false;
  for (int i = first; i < first + count; ++i) {
    has_waited |= threads[i].has_waited;
    has_known |= threads[i].known != nullptr;
  }
  std::shared_ptr<Known> known;
  if (has_known) {
    known = std::make_shared<Known>();
    const Known* last = nullptr;
    for (int i = first; i < first + count; ++i)
      if (threads[i].known && threads[i].known.get() != last)
        take_in(*known, *(last = threads[i].known.get()));
  }
  for (int i = first; i < first + count; ++i) {
    threads[i].has_waited = has_waited;
    if (known) threads[i].known = known;
  }
}

}  // namespace
