// AVX2 with FMA. There is no product of bytes that adds into 32 bits, so the int8 rung is in 7 bits: see SevenBits.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)

#include "scan_256.h"

namespace tmm {
namespace {

// Inline assembly, because gcc 12 reorders the sums until the accumulators do not fit the registers.
inline __attribute__((always_inline)) void add_words(__m256i& sum, __m256i codes, __m256i token) {
  __m256i product;
  asm("vpmaddwd %2, %3, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(token), "x"(codes));
}
inline __attribute__((always_inline)) void add_bytes(__m256i& part, __m256i codes, __m256i token) {
  __m256i product;
  asm("vpmaddubsw %2, %3, %1\n\tvpaddw %1, %0, %0" : "+x"(part), "=&x"(product) : "x"(token), "x"(codes));
}
inline __attribute__((always_inline)) __m256i first_bytes(__m256i codes, __m256i token) {
  __m256i part;
  asm("vpmaddubsw %1, %2, %0" : "=x"(part) : "x"(token), "x"(codes));
  return part;
}
inline __attribute__((always_inline)) void add_pairs(__m256i& sum, __m256i& part) {
  asm("vpmaddwd %2, %1, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "+x"(part) : "xm"(_mm256_set1_epi16(1)));
}
inline __attribute__((always_inline)) void add_products(__m256i& sum, __m256i codes, __m256i token) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(token));
}
inline __attribute__((always_inline)) void add_differences(__m256i& sum, __m256i codes, __m256i token) {
  __m256i gap;
  asm("vsubps %2, %3, %1\n\tvfnmadd231ps %1, %1, %0" : "+x"(sum), "=&x"(gap) : "x"(token), "x"(codes));
}

// Codes are u = q_c + 64 in [1, 127], so |q_c| <= 63; tokens are signed. vpmaddubsw adds two products u q_x into 16 bits, with
// saturation, and up to kRun of those are added in 16 bits, without: a lane then holds the sum over 2 kRun = 8 dimensions. It is
// exact, at every partial sum, because run_scale keeps the sum of |q_x| over those dimensions at 257 or less:
//
//   |sum u q_x| <= 127 sum |q_x| <= 127 * 257 = 32639 < 2^15.
//
// Then two lanes are added into 32 bits.
constexpr int kRun = 4;
constexpr float kCodeLevels = 63.0f;
constexpr float kRunLevels = 253.0f;  // of sum |x| / scale: rounding adds at most 1/2 in each of the 8 dimensions, hence 257

struct SevenBits : IntegerTop {
  static constexpr int kRows = 3;

  template <int kSteps>
  static inline __attribute__((always_inline)) void add_run(__m256i (&sum)[kRows][kTile], Place& at) {
    __m256i part[kRows][kTile];
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; ++step, at.next()) {
      const __m256i c0 = load(at.code), c1 = load(at.code + kLanes);
#pragma GCC unroll 3
      for (int r = 0; r < kRows; ++r) {
        const __m256i t = _mm256_set1_epi32(at.token[r]);
        if (step) {
          add_bytes(part[r][0], c0, t);
          add_bytes(part[r][1], c1, t);
        } else {
          part[r][0] = first_bytes(c0, t);
          part[r][1] = first_bytes(c1, t);
        }
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kRows; ++r) {
      add_pairs(sum[r][0], part[r][0]);
      add_pairs(sum[r][1], part[r][1]);
    }
  }

  static inline __attribute__((always_inline)) void add(__m256i (&sum)[kRows][kTile], Place& at) {
    add_steps<kRows>(sum, at, at.wide, add_words);
    int64_t left = at.narrow;
    for (; left >= kRun; left -= kRun) add_run<kRun>(sum, at);
    if (left & 2) add_run<2>(sum, at);
    if (left & 1) add_run<1>(sum, at);
  }
};

inline __m256 absolute(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline __m256d low_half(__m256 x) { return _mm256_cvtps_pd(_mm256_castps256_ps128(x)); }
inline __m256d high_half(__m256 x) { return _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1)); }

inline float largest_lane(__m256 v) {
  __m128 top = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  top = _mm_max_ps(top, _mm_movehl_ps(top, top));
  return _mm_cvtss_f32(_mm_max_ss(top, _mm_movehdup_ps(top)));
}
inline float sum_lanes(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}
inline double sum_lanes(__m256d v) {
  const __m128d sum = _mm_add_pd(_mm256_castpd256_pd128(v), _mm256_extractf128_pd(v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(sum, _mm_unpackhi_pd(sum, sum)));
}

alignas(32) const int32_t kMasks[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
inline __m256i first8(int64_t left) { return load(kMasks + (left >= 8 ? 0 : left <= 0 ? 8 : 8 - left)); }
inline __m256i first4(int64_t left) {  // 64-bit lanes
  const int64_t count = left >= 4 ? 4 : left <= 0 ? 0 : left;
  return load(kMasks + 8 - 2 * count);
}

// 8 values of a row, `left` of them inside it.
inline __m256 load8(const float* p, int64_t left) { return left >= 8 ? _mm256_loadu_ps(p) : _mm256_maskload_ps(p, first8(left)); }

RowStats centre_f32(const float* row, const float* mean, float scale, int64_t d, float* out) {
  __m256 largest = _mm256_setzero_ps();
  __m256d low = _mm256_setzero_pd(), high = low;
  for (int64_t i = 0; i < d; i += 8) {
    const __m256 z = load8(row + i, d - i), m = load8(mean + i, d - i);
    const __m256 x = _mm256_mul_ps(_mm256_sub_ps(z, m), _mm256_set1_ps(scale));
    _mm256_storeu_ps(out + i, x);
    largest = _mm256_max_ps(largest, absolute(x));
    const __m256d a = _mm256_sub_pd(low_half(z), low_half(m)), b = _mm256_sub_pd(high_half(z), high_half(m));
    low = _mm256_fmadd_pd(a, a, low);
    high = _mm256_fmadd_pd(b, b, high);
  }
  if ((d + 7) / 8 % 2) _mm256_storeu_ps(out + (d + 7) / 8 * 8, _mm256_setzero_ps());
  return {largest_lane(largest), sum_lanes(_mm256_add_pd(low, high))};
}

RowStats centre_f64(const double* row, const float* mean, float scale, int64_t d, float* out) {
  __m128 largest = _mm_setzero_ps();
  __m256d norm2 = _mm256_setzero_pd();
  const int64_t padded = (d + 15) / 16 * 16;
  for (int64_t i = 0; i < padded; i += 4) {  // mean is zero-padded, as out is
    const __m256d z = _mm256_maskload_pd(row + i, first4(d - i)), x = _mm256_sub_pd(z, _mm256_cvtps_pd(_mm_loadu_ps(mean + i)));
    norm2 = _mm256_fmadd_pd(x, x, norm2);
    const __m128 scaled = _mm256_cvtpd_ps(_mm256_mul_pd(x, _mm256_set1_pd(scale)));
    _mm_storeu_ps(out + i, scaled);
    largest = _mm_max_ps(largest, _mm_andnot_ps(_mm_set1_ps(-0.0f), scaled));
  }
  return {largest_lane(_mm256_castps128_ps256(largest)), sum_lanes(norm2)};
}

template <bool kBytes>
QuantStats quantise(const float* x, int64_t padded, float scale, void* out) {
  const __m256 inverse = _mm256_set1_ps(1.0f / scale), unit = _mm256_set1_ps(scale);
  __m256 residual2 = _mm256_setzero_ps();
  __m256i sum = _mm256_setzero_si256();
  for (int64_t i = 0; i < padded; i += 16) {
    __m256i q[2];
    for (int h = 0; h < 2; ++h) {
      const __m256 value = _mm256_loadu_ps(x + i + 8 * h);
      q[h] = _mm256_cvtps_epi32(_mm256_mul_ps(value, inverse));
      const __m256 residual = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(q[h]), unit, value);
      residual2 = _mm256_fmadd_ps(residual, residual, residual2);
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
    if (kBytes) {
      const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<int8_t*>(out) + i), bytes);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(words, _mm256_set1_epi16(1)));
    } else {
      save(static_cast<int16_t*>(out) + i, words);
    }
  }
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  const __m128i pair = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
  return {sum_lanes(residual2), _mm_cvtsi128_si32(pair) + _mm_extract_epi32(pair, 1)};
}

float run_scale(const float* x, int64_t padded) {
  __m256 run = _mm256_setzero_ps();
  for (int64_t i = 0; i < padded; i += 16) {  // the dimensions of a run of 4 steps: in a step, two go to either 16-bit lane
    const __m256 sum = _mm256_add_ps(absolute(_mm256_loadu_ps(x + i)), absolute(_mm256_loadu_ps(x + i + 8)));
    const __m256 pairs = _mm256_hadd_ps(sum, sum);
    run = _mm256_max_ps(run, _mm256_add_ps(pairs, _mm256_permute2f128_ps(pairs, pairs, 1)));
  }
  return largest_lane(run) / kRunLevels;
}

inline int32_t largest_lane(__m256i v) {
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1)));
}

int32_t largest(const int32_t* values, int64_t n, bool two) {  // n is a multiple of 8, as everywhere here
  __m256i a = load(values), b = a;
  int64_t i = 8;
  for (; i + 16 <= n; i += 16) {
    a = _mm256_max_epi32(a, load(values + i));
    b = _mm256_max_epi32(b, load(values + i + 8));
  }
  if (i < n) a = _mm256_max_epi32(a, load(values + i));
  a = _mm256_max_epi32(a, b);
  const int32_t first = largest_lane(a);
  if (!two) return first;
  const __m256i hit = _mm256_cmpeq_epi32(a, _mm256_set1_epi32(first));
  const int mask = _mm256_movemask_ps(_mm256_castsi256_ps(hit));
  return mask & (mask - 1) ? first : largest_lane(_mm256_blendv_epi8(a, _mm256_set1_epi32(INT32_MIN), hit));
}

int64_t collect(const int32_t* values, int64_t n, int32_t threshold, int32_t* out, int64_t capacity) {
  const __m256i below = _mm256_set1_epi32(threshold - 1);
  int64_t count = 0, i = 0;
  const auto hits = [&](int64_t at) {
    const __m256i hit = _mm256_cmpgt_epi32(load(values + at), below);
    return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(hit)));
  };
  const auto emit = [&](int64_t base, uint32_t mask) {
    for (; mask; mask &= mask - 1, ++count)
      if (count < capacity) out[count] = static_cast<int32_t>(base + __builtin_ctz(mask));
  };
  for (; i + 32 <= n; i += 32) {
    const __m256i top = _mm256_max_epi32(_mm256_max_epi32(load(values + i), load(values + i + 8)),
                                         _mm256_max_epi32(load(values + i + 16), load(values + i + 24)));
    const __m256i any = _mm256_cmpgt_epi32(top, below);
    if (!_mm256_testz_si256(any, any)) emit(i, hits(i) | hits(i + 8) << 8 | hits(i + 16) << 16 | hits(i + 24) << 24);
  }
  for (; i < n; i += 8) emit(i, hits(i));
  return count;
}

// 8 values in double precision, `left` of them inside the row.
struct Doubles {
  __m256d low, high;
};
inline __attribute__((always_inline)) Doubles load_doubles(const float* p, int64_t left) {
  if (left >= 8) return {_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
  const __m256 v = _mm256_maskload_ps(p, first8(left));
  return {low_half(v), high_half(v)};
}
inline __attribute__((always_inline)) Doubles load_doubles(const double* p, int64_t left) {
  if (left >= 8) return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)};
  return {_mm256_maskload_pd(p, first4(left)), left > 4 ? _mm256_maskload_pd(p + 4, first4(left - 4)) : _mm256_setzero_pd()};
}

inline __attribute__((always_inline)) __m256d add_square(__m256d sum, __m256d a, __m256d b) {
  const __m256d gap = _mm256_sub_pd(a, b);
  return _mm256_add_pd(sum, _mm256_mul_pd(gap, gap));  // not fused: the same bits in every instruction set
}

// Distances to four codes; each is ((0+4)+(2+6)) + ((1+5)+(3+7)) of its eight partial sums, as in the other instruction sets.
template <class T>
inline __m256d four_distances(const T* z, const T* codes, const int64_t* offset, int64_t d) {
  __m256d low[4], high[4];
  for (int c = 0; c < 4; ++c) low[c] = high[c] = _mm256_setzero_pd();
  for (int64_t i = 0; i < d; i += 8) {
    const Doubles x = load_doubles(z + i, d - i);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Doubles code = load_doubles(codes + offset[c] + i, d - i);
      low[c] = add_square(low[c], x.low, code.low);
      high[c] = add_square(high[c], x.high, code.high);
    }
  }
  __m256d half[4];
  for (int c = 0; c < 4; ++c) half[c] = _mm256_add_pd(low[c], high[c]);
  const __m256d even_ab = _mm256_unpacklo_pd(half[0], half[1]), odd_ab = _mm256_unpackhi_pd(half[0], half[1]);
  const __m256d even_ce = _mm256_unpacklo_pd(half[2], half[3]), odd_ce = _mm256_unpackhi_pd(half[2], half[3]);
  const __m256d zero = _mm256_permute2f128_pd(even_ab, even_ce, 0x20), two = _mm256_permute2f128_pd(even_ab, even_ce, 0x31);
  const __m256d one = _mm256_permute2f128_pd(odd_ab, odd_ce, 0x20), three = _mm256_permute2f128_pd(odd_ab, odd_ce, 0x31);
  return _mm256_add_pd(_mm256_add_pd(zero, two), _mm256_add_pd(one, three));
}

// True if all four codes are farther than `limit` by float32 distances (`beyond`).
inline bool all_farther(const float* z, const float* codes, const int64_t* offset, int64_t d, double limit) {
  __m256 sum[4];
  for (int c = 0; c < 4; ++c) sum[c] = _mm256_setzero_ps();
  for (int64_t i = 0; i < d; i += 8) {
    const __m256 x = load8(z + i, d - i);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m256 gap = _mm256_sub_ps(x, load8(codes + offset[c] + i, d - i));
      sum[c] = _mm256_fmadd_ps(gap, gap, sum[c]);
    }
  }
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(sum[0], sum[1]), _mm256_hadd_ps(sum[2], sum[3]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  return _mm256_movemask_pd(_mm256_cmp_pd(_mm256_cvtps_pd(four), _mm256_set1_pd(beyond(limit, d)), _CMP_GT_OQ)) == 15;
}
inline bool all_farther(const double*, const double*, const int64_t*, int64_t, double) { return false; }

constexpr int64_t kFilterFrom = 16;  // dimensions from which the filter pays

template <class T>
void score(const T* z, const T* codes, int64_t n, int64_t d, int64_t first, Best* best) {
  for (int64_t i = 0; i < n; i += 4) {
    const Offsets offset(n - i, d);
    if (d >= kFilterFrom && all_farther(z, codes + i * d, offset.of, d, best->distance)) continue;
    __m256d distance = four_distances(z, codes + i * d, offset.of, d);
    distance = _mm256_min_pd(distance, _mm256_set1_pd(__builtin_inf()));  // NaN becomes infinity
    __m256d least = _mm256_min_pd(distance, _mm256_permute4x64_pd(distance, 0x4e));
    least = _mm256_min_pd(least, _mm256_permute_pd(least, 5));
    const int lane = __builtin_ctz(_mm256_movemask_pd(_mm256_cmp_pd(distance, least, _CMP_EQ_OQ)));
    const double d2 = _mm256_cvtsd_f64(least);
    const int64_t index = first + i + lane;
    if (d2 < best->distance || (d2 == best->distance && index < best->index)) *best = {d2, index};
  }
}

template <class T>
bool distances(const T* z, const T* codes, int64_t n, int64_t d, double limit, double* out) {
  const Offsets offset(n, d);
  if (d >= kFilterFrom && all_farther(z, codes, offset.of, d, limit)) return false;
  _mm256_storeu_pd(out, _mm256_min_pd(four_distances(z, codes, offset.of, d), _mm256_set1_pd(__builtin_inf())));
  return true;
}

const Isa kIsa = {"avx2",
                  kLanes,
                  kVectors,
                  kTile,
                  {true, true, true, true},
                  {scan<SevenBits>, scan<Plain<IntegerTop, add_words>>, scan<Plain<FloatTop, add_products>>, scan<Plain<FloatTop, add_differences>>},
                  kCodeLevels,
                  64,
                  1,
                  run_scale,
                  centre_f32,
                  centre_f64,
                  {quantise<true>, quantise<false>},
                  largest,
                  collect,
                  score<float>,
                  score<double>,
                  distances<float>,
                  distances<double>,
                  &kTreeAvx2,
                  {{0.024f, 0.034f, 0.049f, 0.07f}, {12, 512, 640}}};

}  // namespace

const Isa* avx2_isa() { return &kIsa; }

}  // namespace tmm

#else

namespace tmm {
const Isa* avx2_isa() { return nullptr; }
}  // namespace tmm

#endif
