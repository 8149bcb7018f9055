// What signed_products.cuh has as PTX, on the CPU. Included by cuda_emulator.h.
#pragma once

namespace {

// PTX ISA "Matrix Fragments for mma.m16n8k32", s8 and s8.
void mma_s8_s8(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
               uint32_t b1) {
  const uint64_t mine[6] = {a0, a1, a2, a3, b0, b1};
  const emulator::Slot* slots = emulator::exchange(mine, sizeof mine, kOpMmaInt);
  const int lane = emulator::my_lane();
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    int sum = 0;
    for (int k = 0; k < 32; ++k) {
      const int a = byte_of(slots[row % 8 * 4 + k % 16 / 4].words[row / 8 + k / 16 * 2], k % 4);
      const int b = byte_of(slots[column * 4 + k % 16 / 4].words[4 + k / 16], k % 4);
      sum += static_cast<int8_t>(a) * static_cast<int8_t>(b);
    }
    d[i] += sum;
  }
}
int dot4_s8_s8(uint32_t a, uint32_t b, int d) {
  for (int i = 0; i < 4; ++i)
    d += static_cast<int8_t>(byte_of(a, i)) * static_cast<int8_t>(byte_of(b, i));
  return d;
}

}  // namespace
