// What cuda_emulator.h tells the race checker (race_check.cpp). Plain loads and stores of a kernel
// tell it by themselves: g++ -fsanitize=thread puts a call before each. Nothing of it is in a build
// without TURBOJET_RACE_CHECK.
#pragma once

#include <stddef.h>

enum RaceOrder { kRelaxed, kAcquireRelease };
enum RaceAccess { kRead, kWrite, kReadAndWrite };

#if TURBOJET_RACE_CHECK
extern "C" {
// A run of blocks: `first_block` counts x first, then y, then z. Threads are numbered over the run.
void race_begin_cluster(unsigned first_block, int num_blocks, int block_threads);
void race_end_cluster();
void race_switch(int thread);
void race_add_shared(const void* base, size_t bytes, const char* name);
void race_drop_shared();
void race_sync_warp(int warp);
void race_sync_block(int block);
void race_wait_for_inputs();
// An access that is not a plain load or store of the kernel; and whether plain ones count.
void race_access(const void* address, size_t bytes, RaceAccess access);
void race_atomic(const void* address, size_t bytes, RaceAccess access, RaceOrder order);
void race_mute(bool is_mute);
// An asynchronous copy: any time between the two.
void race_begin_copy(void* to, const void* from, size_t bytes);
void race_end_copy(void* to, const void* from, size_t bytes);
extern char __start_turbojet_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_turbojet_shared[] __attribute__((weak, visibility("hidden")));
}
#else
inline void race_begin_cluster(unsigned, int, int) {}
inline void race_end_cluster() {}
inline void race_switch(int) {}
inline void race_add_shared(const void*, size_t, const char*) {}
inline void race_drop_shared() {}
inline void race_sync_warp(int) {}
inline void race_sync_block(int) {}
inline void race_wait_for_inputs() {}
inline void race_access(const void*, size_t, RaceAccess) {}
inline void race_atomic(const void*, size_t, RaceAccess, RaceOrder) {}
inline void race_mute(bool) {}
inline void race_begin_copy(void*, const void*, size_t) {}
inline void race_end_copy(void*, const void*, size_t) {}
extern "C" {
extern char __start_turbojet_shared[] __attribute__((weak, visibility("hidden")));
extern char __stop_turbojet_shared[] __attribute__((weak, visibility("hidden")));
}
#endif

// Plain accesses in it are the emulator's.
struct RaceMute {
  RaceMute() { race_mute(true); }
  ~RaceMute() { race_mute(false); }
};
