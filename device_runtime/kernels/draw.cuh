// One row's draw by one block: sample_draw.cu.
#ifndef TURBOJET_DRAW_CUH
#define TURBOJET_DRAW_CUH

#include "philox.cuh"
#include "sampling.cuh"

namespace {

constexpr int kDrawThreads = 512;
constexpr int kBucketsPerUnit = 128;
constexpr int kBuckets = 4096;  // the last one takes all from 32 on, whose weights do not count
constexpr int kOwnBuckets = kBuckets / kDrawThreads;
constexpr int kListSize = 2048;
constexpr int kEdgeSize = 512;
constexpr float kFineSteps = 1 << 21;      // of 1 - exp(-(d - bucket start)), below 2^-7
constexpr float kWeightOne = 17592186044416.0f;  // 2^44
constexpr float kLargestGap = 1e30f;
constexpr uint32_t kInfinity = 0x7f800000u;
static_assert(kOwnBuckets * kDrawThreads == kBuckets, "each thread scans the same number");

struct Shared {
  uint32_t counts[kBuckets];
  uint32_t losses[kBuckets];  // sum of 1 - exp(-(d - bucket start)) in kFineSteps
  uint32_t list_keys[kListSize];
  int32_t list_indices[kListSize];
  uint32_t edge_keys[kEdgeSize];
  uint64_t warps[kDrawThreads / kWarpSize];
  uint64_t warps_too[kDrawThreads / kWarpSize];
  uint64_t found_weight;
  uint64_t weight_before;
  uint32_t found_count;
  uint32_t count_before;
  int32_t bucket;
  int32_t num_list;
  int32_t num_edge;
  uint32_t threshold;
};
constexpr int kSharedBytes = 51496;
static_assert(sizeof(Shared) == kSharedBytes, "as sampling_row.py has it");

__device__ __forceinline__ int bucket_of(float d) {
  // NaN cannot be here: the largest logit is finite, and -inf gives d = inf.
  return d < static_cast<float>(kBuckets / kBucketsPerUnit)
             ? smaller(static_cast<int>(d * kBucketsPerUnit), kBuckets - 1)
             : kBuckets - 1;
}

__device__ __forceinline__ float bucket_start(int bucket) {
  return static_cast<float>(bucket) * (1.0f / kBucketsPerUnit);
}

__device__ __forceinline__ uint64_t weight_of(float d) {
  return d < static_cast<float>(kBuckets / kBucketsPerUnit)
             ? static_cast<uint64_t>(expf(-d) * kWeightOne)
             : 0;
}

template <typename T>
class Draw {
 public:
  __device__ __forceinline__ Draw(const Logits<T>& logits, int vocab_size, float top,
                                  const SamplingRow& row)
      : logits_(logits),
        vocab_size_(vocab_size),
        top_(top),
        row_(row),
        inverse_(__fdiv_rn(1.0f, row.temperature)) {}

  // Returns the token on thread 0.
  __device__ __forceinline__ int run(int position) {
    Shared& shared = *dynamic_shared<Shared>();
    for (int i = threadIdx.x; i < kBuckets; i += kDrawThreads) shared.counts[i] = shared.losses[i] = 0;
    if (threadIdx.x == 0) shared.num_list = 0;
    __syncthreads();
    visit_logits<4>([&](float d, int) {
      const int bucket = bucket_of(d);
      if (bucket == kBuckets - 1) return;
      atomicAdd(&shared.counts[bucket], 1u);
      // 1 - exp(-x) for x < 2^-7: what the series leaves out is far below a fine step.
      const float x = d - bucket_start(bucket);
      const float loss = x * fmaf(x, fmaf(x, 1.0f / 6.0f, -0.5f), 1.0f);
      atomicAdd(&shared.losses[bucket], static_cast<uint32_t>(__float2int_rn(loss * kFineSteps)));
    });
    __syncthreads();
    scan();
    count_last_bucket();

    const bool has_top_k = row_.top_k > 0 && row_.top_k < vocab_size_;
    const bool has_top_p = row_.top_p < 1.0f;
    // Nothing behind `last` survives; tokens up to it are listed if they fit.
    int last = bucket_of(-row_.floor);
    const uint64_t all = total_weight_;
    if (has_top_k || has_top_p) {
      find_bucket(static_cast<uint32_t>(row_.top_k), target(all), has_top_k);
      last = shared.bucket;
    }
    const uint32_t survivors = count_up_to(last);
    has_list_ = survivors <= kListSize;
    if (has_list_) {
      visit_logits<4>([&](float d, int index) {
        if (bucket_of(d) > last) return;
        const int place = atomicAdd(&shared.num_list, 1);
        shared.list_keys[place] = __float_as_uint(d);
        shared.list_indices[place] = index;
      }, last == kBuckets - 1 ? kLargestGap : bucket_start(last + 1));
      __syncthreads();
    }

    // top-k's cut, then top-p's among what that keeps: the code is long, so there is one for both.
    uint32_t threshold = __float_as_uint(-row_.floor), cut = kInfinity;
    uint64_t kept = all;
#pragma unroll 1
    for (int stage = 0; stage < 2; ++stage) {
      const bool by_count = stage == 0;
      if (by_count ? !has_top_k || last == kBuckets - 1 : !has_top_p) continue;
      if (!by_count && has_top_k) find_bucket(0, target(kept), false);
      // Rounding may put the target just behind what is kept: then all of it stays.
      const bool is_inside = shared.bucket <= last;
      const uint64_t weight = is_inside ? target(kept) - shared.weight_before : ~0ull;
      cut = find_cut(is_inside ? shared.bucket : last, row_.top_k - shared.count_before, weight,
                     by_count, cut);
      threshold = cut < threshold ? cut : threshold;
      if (by_count) kept = shared.weight_before + shared.found_weight;
      __syncthreads();
    }

    uint64_t mine = 0;
    visit<2>([&](float d, int index) {
      if (__float_as_uint(d) > threshold) return;
      const float noise =
          gumbel(philox_word(row_.seed_low, row_.seed_high, static_cast<uint32_t>(position),
                             static_cast<uint32_t>(index)));
      const uint64_t candidate = to_candidate(__fadd_rn(noise, -d), index);
      mine = candidate > mine ? candidate : mine;
    });
    __syncthreads();
    return index_of(block_max<kDrawThreads>(mine, shared.warps));
  }

 private:
  // (top - logit) / temperature, correctly rounded: Markstein, "Computation of elementary functions
  // on the IBM RISC System/6000 processor" (1990), theorem 8.1, after one step more than it needs.
  __device__ __forceinline__ float scaled(float gap) const {
    float quotient = gap * inverse_;
    quotient = fmaf(fmaf(-row_.temperature, quotient, gap), inverse_, quotient);
    return fmaf(fmaf(-row_.temperature, quotient, gap), inverse_, quotient);
  }

  // Those up to `most` and a little behind it, with kLoads loads of four logits at once.
  template <int kLoads, typename F>
  __device__ __forceinline__ void visit_logits(F f, float most = kLargestGap) const {
    const float most_gap = fminf(most * row_.temperature * 1.0001f, kLargestGap);
    for (int first = 4 * threadIdx.x; first < vocab_size_; first += kLoads * 4 * kDrawThreads) {
      float values[kLoads][4];
#pragma unroll
      for (int j = 0; j < kLoads; ++j)
        if (first + j * 4 * kDrawThreads < vocab_size_)
          logits_.load(values[j], first + j * 4 * kDrawThreads);
#pragma unroll
      for (int j = 0; j < kLoads; ++j) {
        const int start = first + j * 4 * kDrawThreads;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          // An infinite gap would give NaN; it is as far behind as one of kLargestGap.
          const float gap = fminf(__fadd_rn(top_, -values[j][i]), kLargestGap);
          if (start + i < vocab_size_ && gap <= most_gap) f(scaled(gap), start + i);
        }
      }
    }
  }

  // Over the list, or over all logits when the survivors do not fit it.
  template <int kLoads, typename F>
  __device__ __forceinline__ void visit(F f) const {
    const Shared& shared = *dynamic_shared<Shared>();
    if (!has_list_) {
      visit_logits<kLoads>(f);
      return;
    }
    for (int i = threadIdx.x; i < shared.num_list; i += kDrawThreads)
      f(__uint_as_float(shared.list_keys[i]), shared.list_indices[i]);
  }

  __device__ __forceinline__ uint64_t target(uint64_t weight) const {
    return static_cast<uint64_t>(static_cast<double>(row_.top_p) * static_cast<double>(weight));
  }

  __device__ __forceinline__ uint64_t bucket_weight(int bucket) const {
    const Shared& shared = *dynamic_shared<Shared>();
    if (bucket == kBuckets - 1) return 0;
    const float relative = static_cast<float>(shared.counts[bucket]) -
                           static_cast<float>(shared.losses[bucket]) * (1.0f / kFineSteps);
    return static_cast<uint64_t>(relative * expf(-bucket_start(bucket)) * kWeightOne);
  }

  // Each thread learns what lies before its own buckets, and the total.
  __device__ __forceinline__ void scan() {
    Shared& shared = *dynamic_shared<Shared>();
    const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
    uint64_t weight = 0;
    uint32_t count = 0;
#pragma unroll
    for (int i = 0; i < kOwnBuckets; ++i) {
      count += shared.counts[kOwnBuckets * threadIdx.x + i];
      weight += bucket_weight(kOwnBuckets * threadIdx.x + i);
    }
    const uint32_t own_count = count;
    const uint64_t own_weight = weight;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other_count = __shfl_up_sync(kFullMask, count, offset);
      const uint64_t other_weight = __shfl_up_sync(kFullMask, weight, offset);
      if (lane >= offset) {
        count += other_count;
        weight += other_weight;
      }
    }
    if (lane == kWarpSize - 1) {
      shared.warps[warp] = weight;
      shared.warps_too[warp] = count;
    }
    __syncthreads();
    total_weight_ = 0;
    uint64_t before = 0;
    uint32_t before_count = 0;
    for (int i = 0; i < kDrawThreads / kWarpSize; ++i) {
      if (i < warp) {
        before += shared.warps[i];
        before_count += static_cast<uint32_t>(shared.warps_too[i]);
      }
      total_weight_ += shared.warps[i];
    }
    weight_before_own_ = before + weight - own_weight;
    count_before_own_ = before_count + count - own_count;
    __syncthreads();
  }

  // The last bucket has what the others have not.
  __device__ __forceinline__ void count_last_bucket() {
    Shared& shared = *dynamic_shared<Shared>();
    if (threadIdx.x == kDrawThreads - 1) {
      uint32_t count = count_before_own_;
      for (int i = kBuckets - kOwnBuckets; i < kBuckets - 1; ++i) count += shared.counts[i];
      shared.counts[kBuckets - 1] = static_cast<uint32_t>(vocab_size_) - count;
    }
    __syncthreads();
  }

  // The first bucket up to which counts reach `count`, or weights `weight`; what lies before it.
  __device__ __forceinline__ void find_bucket(uint32_t count, uint64_t weight, bool by_count) {
    Shared& shared = *dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
      shared.bucket = kBuckets - 1;
      shared.count_before = 0;
      shared.weight_before = total_weight_;
    }
    __syncthreads();
    uint32_t count_before = count_before_own_;
    uint64_t weight_before = weight_before_own_;
    for (int i = 0; i < kOwnBuckets; ++i) {
      const int bucket = kOwnBuckets * threadIdx.x + i;
      const uint32_t count_here = shared.counts[bucket];
      const uint64_t weight_here = bucket_weight(bucket);
      const bool starts = by_count ? count_before < count : weight_before < weight;
      const bool reaches = by_count ? count_before + count_here >= count
                                    : weight_before + weight_here >= weight;
      if (starts && reaches) {
        shared.bucket = bucket;
        shared.count_before = count_before;
        shared.weight_before = weight_before;
      }
      count_before += count_here;
      weight_before += weight_here;
    }
    __syncthreads();
  }

  __device__ __forceinline__ uint32_t count_up_to(int bucket) {
    Shared& shared = *dynamic_shared<Shared>();
    if (threadIdx.x == bucket / kOwnBuckets) {
      uint32_t count = count_before_own_;
      for (int i = kOwnBuckets * threadIdx.x; i <= bucket; ++i) count += shared.counts[i];
      shared.found_count = count;
    }
    __syncthreads();
    return shared.found_count;
  }

  // The key of bucket's tokens (not above `most`) at which their number reaches `count` or their
  // weights `weight`, in ascending order of d; the largest if they do not. found_weight is what
  // they weigh up to it.
  __device__ __forceinline__ uint32_t find_cut(int bucket, uint32_t count, uint64_t weight,
                                               bool by_count, uint32_t most) {
    Shared& shared = *dynamic_shared<Shared>();
    if (threadIdx.x == 0) {
      shared.num_edge = 0;
      shared.threshold = 0;
      shared.found_weight = 0;
    }
    __syncthreads();
    visit<1>([&](float d, int) {
      if (bucket_of(d) != bucket || __float_as_uint(d) > most) return;
      const int place = atomicAdd(&shared.num_edge, 1);
      if (place < kEdgeSize) shared.edge_keys[place] = __float_as_uint(d);
    });
    __syncthreads();
    if (shared.num_edge > kEdgeSize) return bisect_cut(bucket, count, weight, by_count, most);
    // Each thread ranks one token among the others of its bucket.
    const int i = threadIdx.x;
    uint32_t key = 0, up_to_count = 0;
    uint64_t up_to_weight = 0;
    bool is_cut = false, is_largest = false;
    if (i < shared.num_edge) {
      key = shared.edge_keys[i];
      uint32_t below_count = 0;
      uint64_t below_weight = 0;
      uint32_t largest = 0;
      for (int j = 0; j < shared.num_edge; ++j) {
        const uint32_t other = shared.edge_keys[j];
        const uint64_t other_weight = weight_of(__uint_as_float(other));
        largest = other > largest ? other : largest;
        below_count += other < key;
        below_weight += other < key ? other_weight : 0;
        up_to_count += other <= key;
        up_to_weight += other <= key ? other_weight : 0;
      }
      is_largest = key == largest;
      is_cut = by_count ? below_count < count && up_to_count >= count
                        : below_weight < weight && up_to_weight >= weight;
    }
    const bool is_found = __syncthreads_or(is_cut);
    if (is_cut || (!is_found && is_largest)) {
      shared.threshold = key;
      shared.found_weight = up_to_weight;
    }
    __syncthreads();
    return shared.threshold;
  }

  // The same by bisection, for buckets that hold more tokens than can be ranked at once.
  __device__ __forceinline__ uint32_t bisect_cut(int bucket, uint32_t count, uint64_t weight,
                                                 bool by_count, uint32_t most) {
    Shared& shared = *dynamic_shared<Shared>();
    uint32_t low = __float_as_uint(bucket_start(bucket));
    uint32_t high = bucket == kBuckets - 1 ? kInfinity : __float_as_uint(bucket_start(bucket + 1));
    high = most < high ? most : high;
    while (true) {
      const uint32_t middle = low + (high - low) / 2;
      uint64_t up_to_count = 0, up_to_weight = 0;
      visit<1>([&](float d, int) {
        if (bucket_of(d) != bucket || __float_as_uint(d) > middle) return;
        ++up_to_count;
        up_to_weight += weight_of(d);
      });
      up_to_count = block_sum(up_to_count, shared.warps);
      up_to_weight = block_sum(up_to_weight, shared.warps_too);
      const bool reaches = by_count ? up_to_count >= count : up_to_weight >= weight;
      if (low == high) {
        if (threadIdx.x == 0) shared.found_weight = up_to_weight;
        __syncthreads();
        return low;
      }
      if (reaches)
        high = middle;
      else
        low = middle + 1;
    }
  }

  __device__ __forceinline__ static uint64_t block_sum(uint64_t value, uint64_t* shared) {
    value = lanes_sum<kWarpSize>(value);
    __syncthreads();
    if (threadIdx.x % kWarpSize == 0) shared[threadIdx.x / kWarpSize] = value;
    __syncthreads();
    value = 0;
    for (int i = 0; i < kDrawThreads / kWarpSize; ++i) value += shared[i];
    return value;
  }

  const Logits<T> logits_;
  const int vocab_size_;
  const float top_;
  const SamplingRow row_;
  const float inverse_;  // of the temperature
  bool has_list_ = false;
  uint64_t total_weight_ = 0;
  uint64_t weight_before_own_ = 0;
  uint32_t count_before_own_ = 0;
};

}  // namespace

#endif
