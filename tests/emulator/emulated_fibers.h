// The threads of a cluster of blocks as fibers, and where they meet; a part of cuda_emulator.h.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <functional>
#include <vector>

#include "race_check.h"

struct dim3 { unsigned x, y, z; };

namespace emulator {

constexpr int kLanes = 32;
constexpr int kMaxThreads = 4096;  // of a cluster
constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kMostCollectives = 1 << 18;  // of a thread that is not in a loop without end
constexpr int kSyncWarp = 2;  // the operation of lanes that memory is ordered by

struct Copy { void* to; const void* from; int bytes; };

struct Thread {
  jmp_buf where;
  ucontext_t start;
  dim3 index;
  int number;
  bool is_done;
  unsigned collectives;
  unsigned cluster_turn;  // barriers of the cluster it has arrived at
  std::vector<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open_group;
};

struct Rendezvous {
  int arrived;
  unsigned generation;
  int operation;
};

struct Slot { uint64_t words[8]; };

struct Warp {
  Rendezvous meeting;
  Slot slots[2][kLanes];
};

struct Block {
  dim3 index;
  Rendezvous meeting;
  int num_live;
  int any, any_before;  // of the threads at __syncthreads_or, and at the last one
  char* shared;
};

struct State {
  Thread threads[kMaxThreads];
  Warp warps[kMaxThreads / kLanes];
  Block blocks[kMaxThreads / kLanes];  // of the cluster
  unsigned arrivals;                   // at the cluster's barriers, all of them together
  int num_blocks, num_threads, num_live, current, idle_yields;
  dim3 grid_size, block_size;
  std::function<void()> body;
  jmp_buf scheduler;
  char message[256];
};

inline State state;
inline char* stacks = nullptr;

inline Thread& me() { return state.threads[state.current]; }
inline Warp& my_warp() { return state.warps[state.current / kLanes]; }
inline Block& my_block() { return state.blocks[state.current / state.block_size.x]; }
inline int my_lane() { return state.current % kLanes; }

[[noreturn]] inline void fail(const char* text) {
  snprintf(state.message, sizeof state.message, "%s (block %u,%u,%u thread %d)", text,
           my_block().index.x, my_block().index.y, my_block().index.z, me().number);
  _longjmp(state.scheduler, 2);
}

inline void resume_next() {
  int next = state.current;
  do next = next + 1 == state.num_threads ? 0 : next + 1;
  while (state.threads[next].is_done);
  state.current = next;
  race_switch(next);
  _longjmp(state.threads[next].where, 1);
}

inline void yield() {
  if (++state.idle_yields > 8 * state.num_threads) fail("deadlock: no thread can go on");
  if (_setjmp(me().where) == 0) resume_next();
}

// Returns whether it was the last to come.
inline bool meet(Rendezvous& meeting, int expected, int operation) {
  if (meeting.arrived == 0) meeting.operation = operation;
  if (meeting.operation != operation) fail("lanes of a warp are at different operations");
  const unsigned generation = meeting.generation;
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    ++meeting.generation;
    state.idle_yields = 0;
    return true;
  }
  while (meeting.generation == generation) yield();
  return false;
}

// Every lane puts words in and then sees what all lanes put in.
inline const Slot* exchange(const void* data, int bytes, int operation) {
  Warp& warp = my_warp();
  if (me().collectives == kMostCollectives) fail("a warp waits for what does not come");
  Slot* slots = warp.slots[me().collectives++ % 2];
  memcpy(slots[my_lane()].words, data, bytes);
  if (meet(warp.meeting, kLanes, operation) && operation == kSyncWarp)
    race_sync_warp(state.current / kLanes);
  return slots;
}

inline void enter() {
  state.body();
  me().is_done = true;
  state.idle_yields = 0;
  --my_block().num_live;
  if (--state.num_live == 0) _longjmp(state.scheduler, 1);
  resume_next();
}

inline void run_cluster() {
  state.num_live = state.num_threads;
  state.idle_yields = 0;
  state.arrivals = 0;
  for (Block& block : state.blocks) {
    block.meeting = {};
    block.num_live = state.block_size.x;
    block.any = 0;
  }
  for (Warp& warp : state.warps) warp.meeting = {};
  for (int i = 0; i < state.num_threads; ++i) {
    Thread& thread = state.threads[i];
    thread.number = i % state.block_size.x;
    thread.index = {static_cast<unsigned>(thread.number), 0, 0};
    thread.cluster_turn = 0;
    thread.is_done = false;
    thread.collectives = 0;
    thread.groups.clear();
    thread.open_group.clear();
  }
  // A fiber is born by swapcontext into its own stack, parks at once, and is resumed by longjmp.
  static ucontext_t home;
  for (int i = 0; i < state.num_threads; ++i) {
    Thread& thread = state.threads[i];
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = stacks + i * kStackBytes;
    thread.start.uc_stack.ss_size = kStackBytes;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, reinterpret_cast<void (*)()>(+[] {
                  if (_setjmp(me().where) == 0) setcontext(&home);
                  enter();
                }), 0);
    state.current = i;
    swapcontext(&home, &thread.start);
  }
  state.current = 0;
  const dim3& first = state.blocks[0].index;
  race_begin_cluster((first.z * state.grid_size.y + first.y) * state.grid_size.x + first.x,
                     state.num_blocks, state.block_size.x);
  const int reason = _setjmp(state.scheduler);
  if (reason == 0) {
    race_switch(0);
    _longjmp(state.threads[0].where, 1);
  }
  race_end_cluster();
}

// CUDA says nothing about the order in which blocks start.
inline bool is_backwards = false;
inline unsigned in_turn(unsigned index, unsigned count) {
  return is_backwards ? count - 1 - index : index;
}

inline const char* run(dim3 grid, int block, int cluster, size_t shared_bytes,
                       std::function<void()> body) {
  if (stacks == nullptr) stacks = static_cast<char*>(malloc(kStackBytes * kMaxThreads));
  state.message[0] = 0;
  state.num_blocks = cluster;
  state.num_threads = block * cluster;
  state.grid_size = grid;
  state.block_size = {static_cast<unsigned>(block), 1, 1};
  state.body = std::move(body);
  if (block % kLanes || state.num_threads > kMaxThreads || grid.x % cluster)
    return "the emulator cannot run this launch shape";
  // Exactly as large as asked for, with a guard behind it.
  const size_t padded = (shared_bytes + 15) / 16 * 16;
  for (int i = 0; i < cluster; ++i) {
    state.blocks[i].shared = static_cast<char*>(aligned_alloc(16, padded + 64));
    race_add_shared(state.blocks[i].shared, shared_bytes, "dynamic shared memory");
  }
  char* const fixed = __start_turbojet_shared;
  const size_t fixed_bytes = fixed == nullptr ? 0 : __stop_turbojet_shared - fixed;
  if (fixed_bytes && cluster > 1) return "the emulator has __shared__ arrays for one block";
  race_add_shared(fixed, fixed_bytes, "__shared__ array");
  for (unsigned i = 0; i < grid.z && !state.message[0]; ++i)
    for (unsigned j = 0; j < grid.y && !state.message[0]; ++j)
      for (unsigned k = 0; k < grid.x && !state.message[0]; k += cluster) {
        const unsigned z = in_turn(i, grid.z), y = in_turn(j, grid.y);
        const unsigned x = in_turn(k / cluster, grid.x / cluster) * cluster;
        for (int i = 0; i < cluster; ++i) {
          memset(state.blocks[i].shared, 0xff, shared_bytes);
          memset(state.blocks[i].shared + shared_bytes, 0xa5, padded + 64 - shared_bytes);
          state.blocks[i].index = {x + i, y, z};
        }
        if (fixed_bytes) memset(fixed, 0xff, fixed_bytes);
        run_cluster();
        for (size_t i = 0; i < cluster * (padded + 64 - shared_bytes); ++i) {
          const size_t at = shared_bytes + i / cluster;
          const char* const shared = state.blocks[i % cluster].shared;
          if (!state.message[0] && static_cast<unsigned char>(shared[at]) != 0xa5)
            snprintf(state.message, sizeof state.message,
                     "wrote past %zu bytes of shared memory, at %zu", shared_bytes, at);
        }
      }
  for (int i = 0; i < cluster; ++i) free(state.blocks[i].shared);
  race_drop_shared();
  return state.message[0] ? state.message : nullptr;
}

inline void perform(const Copy& copy) {
  memcpy(copy.to, copy.from, copy.bytes);
  race_end_copy(copy.to, copy.from, copy.bytes);
}

}  // namespace emulator
