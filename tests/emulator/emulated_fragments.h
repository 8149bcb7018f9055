// What fragments.cuh has as PTX, on the CPU. Included by cuda_emulator.h.
#pragma once

namespace {

// PTX ISA "Matrix Fragments for mma.m16n8k16", fp16 with fp32 sums.
void mma_f16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
             uint32_t b1) {
  const uint32_t words[6] = {a0, a1, a2, a3, b0, b1};
  float mine[6][2];
  for (int i = 0; i < 12; ++i) mine[i / 2][i % 2] = emulated_to_float(words[i / 2] >> i % 2 * 16);
  const emulator::Slot* slots = emulator::exchange(mine, sizeof mine, kOpMmaHalf);
  const auto values = [=](int lane, int word) {
    return reinterpret_cast<const float*>(slots[lane].words) + 2 * word;
  };
  const int lane = emulator::my_lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 8; ++k) {
      const float* const a = values(row % 8 * 4 + k % 4, row / 8 + k / 4 * 2);
      const float* const b = values(column * 4 + k % 4, 4 + k / 4);
      sum += a[0] * b[0];
      sum += a[1] * b[1];
    }
    d[i] += sum;
  }
}
float exp2_fast(float value) { return exp2f(value); }
float log2_fast(float value) { return log2f(value); }
template <typename T>
EMULATED_INLINE T load_of_other_block(const T* pointer) {
  race_atomic(pointer, sizeof *pointer, kRead, kRelaxed);
  const RaceMute mute;
  return *pointer;
}
template <typename T>
EMULATED_INLINE void store_for_other_block(T* pointer, T value) {
  race_atomic(pointer, sizeof *pointer, kWrite, kRelaxed);
  const RaceMute mute;
  *pointer = value;
}
EMULATED_INLINE uint32_t take_ticket(uint32_t* counter) {
  race_atomic(counter, sizeof *counter, kReadAndWrite, kAcquireRelease);
  const RaceMute mute;
  return (*counter)++;
}

}  // namespace
inline float cospif(float value) { return static_cast<float>(cos(M_PI * value)); }
inline float sinpif(float value) { return static_cast<float>(sin(M_PI * value)); }
