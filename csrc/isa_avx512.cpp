// AVX-512 with VNNI.
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)

#include "mask_512.h"
#include "scan_512.h"

namespace tmm {
namespace {

template <class T>
void scan(const ScanArgs& args) {
  const T* tag = nullptr;
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const __m512i* codes = static_cast<const __m512i*>(args.codes) + panel * args.steps * kVectors;
    const int32_t* table = panel_biases(args, panel, tag);
    int32_t* groups = args.groups + panel / args.span * kLanes;
    for (int64_t tile = 0; tile < args.tiles; ++tile) {
      const int32_t* token = args.tokens + tile * args.steps * kTileRows;
      const uint8_t* scale_of = args.scale_of + tile * kTileRows;
      __m512i sum[kTileRows][kVectors];
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const int32_t* start = is_float(tag) ? table : table + scale_of[r] * kPanel;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_loadu_si512(start + v * kLanes);
      }
      const __m512i* code = codes;
      int64_t step = 0;
      if (sizeof(T) == sizeof(uint8_t) && !is_float(tag))
        for (; step < args.wide; ++step, code += kVectors, token += kTileRows)
          add_step(sum, code, token, static_cast<const int16_t*>(nullptr));
      for (; step < args.steps; ++step, code += kVectors, token += kTileRows) add_step(sum, code, token, tag);
      store_tops(sum, groups + tile * kTileRows * args.group_stride, args.group_stride, panel % args.span == 0, tag);
    }
  }
}

inline __mmask16 first16(int64_t left) { return left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1); }
inline __mmask8 first8(int64_t left) { return left >= 8 ? 0xff : left <= 0 ? 0 : static_cast<__mmask8>((1u << left) - 1); }
inline __m512d low_half(__m512 x) { return _mm512_cvtps_pd(_mm512_castps512_ps256(x)); }
inline __m512d high_half(__m512 x) { return _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1)); }

RowStats centre_f32(const float* row, const float* mean, float scale, int64_t d, float* out) {
  __m512 largest = _mm512_setzero_ps();
  __m512d low = _mm512_setzero_pd(), high = low;
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 mask = first16(d - i);
    const __m512 z = _mm512_maskz_loadu_ps(mask, row + i), m = _mm512_maskz_loadu_ps(mask, mean + i);
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(z, m), _mm512_set1_ps(scale));
    _mm512_storeu_ps(out + i, x);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
    const __m512d a = _mm512_sub_pd(low_half(z), low_half(m)), b = _mm512_sub_pd(high_half(z), high_half(m));
    low = _mm512_fmadd_pd(a, a, low);
    high = _mm512_fmadd_pd(b, b, high);
  }
  return {_mm512_reduce_max_ps(largest), _mm512_reduce_add_pd(_mm512_add_pd(low, high))};
}

RowStats centre_f64(const double* row, const float* mean, float scale, int64_t d, float* out) {
  __m512 largest = _mm512_setzero_ps();
  __m512d norm2 = _mm512_setzero_pd();
  for (int64_t i = 0; i < d; i += 16) {
    __m256 half[2];
    for (int h = 0; h < 2; ++h) {
      const __mmask8 mask = first8(d - i - 8 * h);
      const __m512d m = _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, mean + i + 8 * h));
      const __m512d x = _mm512_sub_pd(_mm512_maskz_loadu_pd(mask, row + i + 8 * h), m);
      norm2 = _mm512_fmadd_pd(x, x, norm2);
      half[h] = _mm512_cvtpd_ps(_mm512_mul_pd(x, _mm512_set1_pd(scale)));
    }
    const __m512 x = _mm512_insertf32x8(_mm512_castps256_ps512(half[0]), half[1], 1);
    _mm512_storeu_ps(out + i, x);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(x));
  }
  return {_mm512_reduce_max_ps(largest), _mm512_reduce_add_pd(norm2)};
}

template <bool kBytes>
QuantStats quantise(const float* x, int64_t padded, float scale, void* out) {
  const __m512 inverse = _mm512_set1_ps(1.0f / scale), unit = _mm512_set1_ps(scale);
  __m512 residual2 = _mm512_setzero_ps();
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 value = _mm512_loadu_ps(x + i);
    const __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
    const __m512 residual = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(q), unit, value);
    residual2 = _mm512_fmadd_ps(residual, residual, residual2);
    if (kBytes) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<int8_t*>(out) + i), _mm512_cvtsepi32_epi8(q));
      sum = _mm512_add_epi32(sum, q);
    } else {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<int16_t*>(out) + i), _mm512_cvtsepi32_epi16(q));
    }
  }
  return {_mm512_reduce_add_ps(residual2), kBytes ? _mm512_reduce_add_epi32(sum) : 0};
}

int32_t largest(const int32_t* values, int64_t n, bool two) {  // n is a multiple of 16, as everywhere here
  __m512i a = _mm512_loadu_si512(values), b = a;
  int64_t i = 16;
  for (; i + 32 <= n; i += 32) {
    a = _mm512_max_epi32(a, _mm512_loadu_si512(values + i));
    b = _mm512_max_epi32(b, _mm512_loadu_si512(values + i + 16));
  }
  if (i < n) a = _mm512_max_epi32(a, _mm512_loadu_si512(values + i));
  const __m512i top = _mm512_max_epi32(a, b);
  const int32_t first = _mm512_reduce_max_epi32(top);
  if (!two) return first;
  const uint32_t mask = bits_of(_mm512_cmpeq_epi32_mask(top, _mm512_set1_epi32(first)));
  return mask & (mask - 1) ? first : _mm512_mask_reduce_max_epi32(static_cast<__mmask16>(~mask), top);
}

int64_t collect(const int32_t* values, int64_t n, int32_t threshold, int32_t* out, int64_t capacity) {
  const __m512i limit = _mm512_set1_epi32(threshold);
  int64_t count = 0, i = 0;
  const auto reached = [&](__m512i v) -> uint64_t { return bits_of(_mm512_cmpge_epi32_mask(v, limit)); };
  const auto emit = [&](int64_t base, uint64_t mask) {
    for (; mask; mask &= mask - 1, ++count)
      if (count < capacity) out[count] = static_cast<int32_t>(base + __builtin_ctzll(mask));
  };
  for (; i + 64 <= n; i += 64) {
    const __m512i a = _mm512_loadu_si512(values + i), b = _mm512_loadu_si512(values + i + 16);
    const __m512i c = _mm512_loadu_si512(values + i + 32), d = _mm512_loadu_si512(values + i + 48);
    const __m512i top = _mm512_max_epi32(_mm512_max_epi32(a, b), _mm512_max_epi32(c, d));
    if (!_mm512_cmpge_epi32_mask(top, limit)) continue;
    emit(i, reached(a) | reached(b) << 16 | reached(c) << 32 | reached(d) << 48);
  }
  for (; i < n; i += 16) emit(i, reached(_mm512_loadu_si512(values + i)));
  return count;
}

inline __m512d load8(const float* p, __mmask8 mask) { return _mm512_cvtps_pd(_mm256_maskz_loadu_ps(mask, p)); }
inline __m512d load8(const double* p, __mmask8 mask) { return _mm512_maskz_loadu_pd(mask, p); }

inline __m256d halves(__m512d sum) { return _mm256_add_pd(_mm512_castpd512_pd256(sum), _mm512_extractf64x4_pd(sum, 1)); }

inline __m512d load8(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline __m512d load8(const double* p) { return _mm512_loadu_pd(p); }

inline __m512d squared_gap(__m512d sum, __m512d z, __m512d code) {
  const __m512d gap = _mm512_sub_pd(z, code);
  return _mm512_add_pd(sum, _mm512_mul_pd(gap, gap));  // not fused: the same bits without FMA
}

// Distances to four codes; each is ((0+4)+(2+6)) + ((1+5)+(3+7)) of its partial sums, as in the other instruction sets.
template <class T>
inline __m256d four_distances(const T* z, const T* codes, const int64_t* offset, int64_t d) {
  __m512d a = _mm512_setzero_pd(), b = a, c = a, e = a;
  int64_t i = 0;
  for (; i + 8 <= d; i += 8) {
    const __m512d x = load8(z + i);
    a = squared_gap(a, x, load8(codes + offset[0] + i));
    b = squared_gap(b, x, load8(codes + offset[1] + i));
    c = squared_gap(c, x, load8(codes + offset[2] + i));
    e = squared_gap(e, x, load8(codes + offset[3] + i));
  }
  if (i < d) {
    const __mmask8 mask = first8(d - i);
    const __m512d x = load8(z + i, mask);
    a = squared_gap(a, x, load8(codes + offset[0] + i, mask));
    b = squared_gap(b, x, load8(codes + offset[1] + i, mask));
    c = squared_gap(c, x, load8(codes + offset[2] + i, mask));
    e = squared_gap(e, x, load8(codes + offset[3] + i, mask));
  }
  const __m256d ha = halves(a), hb = halves(b), hc = halves(c), he = halves(e);
  const __m256d even_ab = _mm256_unpacklo_pd(ha, hb), odd_ab = _mm256_unpackhi_pd(ha, hb);
  const __m256d even_ce = _mm256_unpacklo_pd(hc, he), odd_ce = _mm256_unpackhi_pd(hc, he);
  const __m256d zero = _mm256_permute2f128_pd(even_ab, even_ce, 0x20), two = _mm256_permute2f128_pd(even_ab, even_ce, 0x31);
  const __m256d one = _mm256_permute2f128_pd(odd_ab, odd_ce, 0x20), three = _mm256_permute2f128_pd(odd_ab, odd_ce, 0x31);
  return _mm256_add_pd(_mm256_add_pd(zero, two), _mm256_add_pd(one, three));
}

// True if all four codes are farther than `limit` by float32 distances (`beyond`).
inline bool all_farther(const float* z, const float* codes, const int64_t* offset, int64_t d, double limit) {
  __m512 sum[4];
  for (int c = 0; c < 4; ++c) sum[c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < d; i += 16) {
    const __mmask16 mask = first16(d - i);
    const __m512 x = _mm512_maskz_loadu_ps(mask, z + i);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512 gap = _mm512_sub_ps(x, _mm512_maskz_loadu_ps(mask, codes + offset[c] + i));
      sum[c] = _mm512_fmadd_ps(gap, gap, sum[c]);
    }
  }
  __m256 half[4];
  for (int c = 0; c < 4; ++c) half[c] = _mm256_add_ps(_mm512_castps512_ps256(sum[c]), _mm512_extractf32x8_ps(sum[c], 1));
  const __m256 pairs = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(pairs), _mm256_extractf128_ps(pairs, 1));
  return _mm256_cmp_pd_mask(_mm256_cvtps_pd(four), _mm256_set1_pd(beyond(limit, d)), _CMP_GT_OQ) == 15;
}
inline bool all_farther(const double*, const double*, const int64_t*, int64_t, double) { return false; }

constexpr int64_t kFilterFrom = 128;  // dimensions from which the filter pays

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

const Isa kIsa = {"avx512_vnni",
                  kLanes,
                  kVectors,
                  kVectors,
                  {true, true, true, true},
                  {scan<uint8_t>, scan<int16_t>, scan<float>, scan<Gap>},
                  127.0f,
                  128,
                  1,
                  nullptr,
                  centre_f32,
                  centre_f64,
                  {quantise<true>, quantise<false>},
                  largest,
                  collect,
                  score<float>,
                  score<double>,
                  distances<float>,
                  distances<double>,
                  &kTreeAvx512,
                  {{0.0125f, 0.0197f, 0.042f, 0.08f}, {10, 512, 2400}}};

}  // namespace

const Isa* avx512_isa() { return &kIsa; }

}  // namespace tmm

#else

namespace tmm {
const Isa* avx512_isa() { return nullptr; }
}  // namespace tmm

#endif
