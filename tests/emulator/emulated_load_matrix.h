// What load_matrix.cuh has as PTX, on the CPU. Included by cuda_emulator.h.
#pragma once

namespace {

template <int kCount>
EMULATED_INLINE void emulated_load_matrices(uint32_t (&r)[kCount], const void* row, bool is_transposed) {
  const uint64_t mine = reinterpret_cast<uint64_t>(row);
  if (mine % 16) emulator::fail("a row of a matrix is not aligned");
  const emulator::Slot* slots = emulator::exchange(&mine, 8, kOpLoadMatrix);
  const int lane = emulator::my_lane();
  for (int j = 0; j < kCount; ++j) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int fast = lane % 4 * 2 + i, slow = lane / 4;
      const int matrix_row = is_transposed ? fast : slow, column = is_transposed ? slow : fast;
      const uint16_t* const element =
          reinterpret_cast<const uint16_t*>(slots[8 * j + matrix_row].words[0]) + column;
      race_access(element, 2, kRead);
      const RaceMute mute;
      memcpy(&pair[i], element, 2);
    }
    memcpy(&r[j], pair, 4);
  }
}
EMULATED_INLINE void load_matrices(uint32_t (&r)[4], const void* row) { emulated_load_matrices(r, row, false); }
EMULATED_INLINE void load_two_matrices(uint32_t (&r)[2], const void* row) { emulated_load_matrices(r, row, false); }
EMULATED_INLINE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulated_load_matrices(r, row, true);
}

uint16_t flushed(uint16_t bits) { return (bits & 0x7c00) == 0 ? bits & 0x8000 : bits; }
float flushed_half(uint32_t pair, int half) { return emulated_to_float(flushed(pair >> 16 * half)); }
uint32_t flushed_pair(float low, float high) {
  return flushed(emulated_to_bits(low)) | static_cast<uint32_t>(flushed(emulated_to_bits(high))) << 16;
}
// .ftz: subnormal operands and results are zeros of their sign.
uint32_t subtract_pairs(uint32_t a, uint32_t b) {
  return flushed_pair(flushed_half(a, 0) - flushed_half(b, 0), flushed_half(a, 1) - flushed_half(b, 1));
}
uint32_t multiply_pairs(uint32_t a, uint32_t b) {
  return flushed_pair(flushed_half(a, 0) * flushed_half(b, 0), flushed_half(a, 1) * flushed_half(b, 1));
}
EMULATED_INLINE void copy16_or_zeros_async(void* shared, const void* global, bool has_data) {
  alignas(16) static const char zeros[16] = {};
  copy16_async(shared, has_data ? global : zeros);
}

template <uint32_t kMask, uint32_t kBits>
uint32_t mask_and_set(uint32_t word) { return (word & kMask) | kBits; }
float4 load_quad_shared_by_blocks(const float4* pointer) { return *pointer; }

}  // namespace
