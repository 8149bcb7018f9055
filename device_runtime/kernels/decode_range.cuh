// Which cached tokens a block of decode_attention.cu attends to, and where they lie.
#ifndef TURBOJET_DECODE_RANGE_CUH
#define TURBOJET_DECODE_RANGE_CUH

#include "decode_switches.cuh"
#include "kv_cache.cuh"

namespace {

// Division by a number that stays the same, as a product; exact while dividend * divisor < 2^32.
class Divisor {
 public:
  __device__ __forceinline__ explicit Divisor(int divisor)
      : inverse_(divisor == 1 ? 0u : 0xffffffffu / static_cast<uint32_t>(divisor) + 1u) {}

  __device__ __forceinline__ int divide(int dividend) const {
    return inverse_ == 0
               ? dividend
               : static_cast<int>(__umulhi(static_cast<uint32_t>(dividend), inverse_));
  }

 private:
  uint32_t inverse_;  // 2^32 / divisor, rounded up; 0 for 1
};

// Where the steps of a block lie.
struct StepRange {
  Pages pages;
  const int32_t* page_list;  // of the row, in shared memory
  Divisor page_units;        // units of a page
  int head;
  int first;  // the first warp's first step
  int last;
  int num_tokens;  // in the cache

  template <class Layout>
  __device__ __forceinline__ char* unit_address(int unit) const {
    const int place = page_units.divide(unit);
    const int per_page = pages.page_size / Layout::kTokens;
    return Layout::address(pages, page_list[place], head, unit - place * per_page);
  }
};

}  // namespace

#endif
