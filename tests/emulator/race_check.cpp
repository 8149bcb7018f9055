// Finds data races of emulated kernels: two accesses to a byte, one of them a write and not both
// atomic, that nothing orders. One library for all kernels, so that it sees a whole stream.
//
// What orders a before b (anything else, lock-step of a warp or a shuffle included, does not):
//   the same thread; __syncwarp between lanes; __syncthreads between threads of a block;
//   atom.acq_rel on one address, from what its thread knew to whoever adds later (PTX ISA,
//   "Memory Consistency Model"); for an asynchronous copy, its thread's wait and then one of these;
//   a kernel launch: a full edge after all that the kernel before it had waited for; a programmatic
//   one (griddepcontrol) starts when that one starts, and is after it only from its own wait on. A
//   kernel that never waits is not after anything, nor is what follows it.
// Atomics, relaxed ones too, are no race with each other; they order only what is said above. Writes
// of the same value by two threads are none either. Blocks and launches are emulated one after
// another, but nothing is concluded from that.
#include "race_check.h"

#include "race_memory.h"

#define CALLER __builtin_return_address(0)

extern "C" {

// --- called from Python -------------------------------------------------------------------------

void race_add_global(const void* base, size_t bytes, const char* name) {
  add_region(base, bytes, name, false);
}

void race_drop_global(const void* base) {
  drop_regions([&](const Region& region) {
    return region.begin == reinterpret_cast<uintptr_t>(base);
  });
}

void race_begin_launch(const char* name, int is_programmatic) {
  Launch next;
  next.number = static_cast<uint32_t>(names.size());
  next.is_programmatic = is_programmatic && is_after_kernel;
  next.at_wait = complete;
  next.at_start = next.is_programmatic ? launch.at_start : complete;
  names.push_back(name);
  launch = std::move(next);
  released.clear();
  is_after_kernel = true;
}

void race_end_launch() {
  if (launch.is_programmatic && !launch.has_waited) {
    complete = launch.at_start;
    Record nobody{};
    nobody.launch = launch.number;
    reports.push_back({"never waits for the kernels before it", "", 0, nobody, nobody});
  }
  complete.add(launch.number);
}

// What the host enqueues between kernels, or a graph's begin and end: after all before it.
void race_full_edge() { is_after_kernel = false; }

// Lines of: what, array, offset, then of both accesses: kernel, launch, block, thread, kind, address.
const char* race_reports() {
  text.clear();
  for (const Report& report : reports) {
    text += report.what + "\t" + report.region + "\t" + std::to_string(report.offset);
    for (const Record* record : {&report.earlier, &report.later}) {
      char line[200];
      snprintf(line, sizeof line, "\t%s\t%u\t%u\t%u\t%s%s\t%#zx",
               names[record->launch].c_str(), record->launch, record->thread, record->level,
               record->is_atomic         ? "atomic "
               : record->is_asynchronous ? "asynchronous "
                                         : "",
               record->is_write ? "write" : "read", reinterpret_cast<size_t>(record->where));
      text += line;
    }
    text += "\n";
  }
  reports.clear();
  reported.clear();
  return text.c_str();
}

// --- called from the emulator -------------------------------------------------------------------

void race_begin_cluster(unsigned first_block, int num_blocks, int threads_of_block) {
  block_threads = threads_of_block;
  first_thread = first_block * block_threads;
  threads.assign(num_blocks * block_threads, Thread{});
  for (size_t i = 0; i < threads.size(); ++i) {
    threads[i].id = first_thread + i;
    threads[i].warp_turn = threads[i].block_turn = threads[i].clock = 1;
  }
  for (const auto& region : regions) region->stamp += region->is_shared;
}

void race_end_cluster() {
  settle_doubts();
  for (const Thread& thread : threads) launch.has_waited |= thread.has_waited;
  now = nullptr;
}

void race_switch(int thread) { now = &threads[thread]; }

void race_add_shared(const void* base, size_t bytes, const char* name) {
  if (bytes) add_region(base, bytes, name, true);
}

void race_drop_shared() {
  drop_regions([](const Region& region) { return region.is_shared; });
}

void race_sync_warp(int warp) {
  for (int i = warp * kWarp; i < (warp + 1) * kWarp; ++i) ++threads[i].warp_turn;
  join(warp * kWarp, kWarp);
}

void race_sync_block(int block) {
  const int first = block * block_threads;
  for (unsigned i = 0; i < block_threads; ++i) ++threads[first + i].block_turn;
  join(first, block_threads);
}

void race_wait_for_inputs() { now->has_waited = true; }

void race_mute(bool is_mute_now) { is_mute = is_mute_now; }

void race_access(const void* address, size_t bytes, RaceAccess access) {
  see(address, bytes, access != kRead, CALLER);
}

void race_atomic(const void* address, size_t bytes, RaceAccess access, RaceOrder order) {
  if (!now) return;
  const auto place = reinterpret_cast<uintptr_t>(address);
  use(place, bytes, access != kRead, kAtomic, CALLER);
  if (order == kRelaxed) return;
  Known& known = released[place];
  auto mine = std::make_shared<Known>(known);
  if (now->known) take_in(*mine, *now->known);
  known = *mine;
  now->known = mine;
  ++now->clock;
  known[kThreadKind | now->id] = now->clock;
  known[kWarpKind | now->id / kWarp] = now->warp_turn;
  known[kBlockKind | now->id / block_threads] = now->block_turn;
}

void race_begin_copy(void* to, const void* from, size_t bytes) {
  if (!now) return;
  use(reinterpret_cast<uintptr_t>(from), bytes, false, kAsynchronous, CALLER);
  use(reinterpret_cast<uintptr_t>(to), bytes, true, kAsynchronous, CALLER);
  if (Region* const region = find(reinterpret_cast<uintptr_t>(to)))
    for_cells(*region, reinterpret_cast<uintptr_t>(to) - region->begin, bytes,
              [](Cell& cell, size_t, size_t) { cell.write.is_copying = true; });
}

void race_end_copy(void* to, const void* from, size_t bytes) {
  if (!now) return;
  const void* where = CALLER;
  if (Region* const region = find(reinterpret_cast<uintptr_t>(to)))
    for_cells(*region, reinterpret_cast<uintptr_t>(to) - region->begin, bytes,
              [&](Cell& cell, size_t, size_t) {
                Record& write = cell.write;
                if (!write.is_copying || write.thread != now->id) return;
                where = write.where;
                write = record_of(true, kAsynchronous, where);
              });
  // The copy may have read until now.
  use(reinterpret_cast<uintptr_t>(from), bytes, false, kAsynchronous, where);
}

// --- called by instrumented code ----------------------------------------------------------------

void __tsan_init() {}
#define ACCESS(kBytes)                                                                      \
  void __tsan_read##kBytes(void* a) { see(a, kBytes, false, CALLER); }                      \
  void __tsan_write##kBytes(void* a) { see(a, kBytes, true, CALLER); }
#define UNALIGNED(kBytes)                                                                   \
  void __tsan_unaligned_read##kBytes(void* a) { see(a, kBytes, false, CALLER); }            \
  void __tsan_unaligned_write##kBytes(void* a) { see(a, kBytes, true, CALLER); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
UNALIGNED(2)
UNALIGNED(4)
UNALIGNED(8)
UNALIGNED(16)
void __tsan_read_range(void* a, size_t bytes) { see(a, bytes, false, CALLER); }
void __tsan_write_range(void* a, size_t bytes) { see(a, bytes, true, CALLER); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}

}  // extern "C"
