// AVX2 with FMA: float32 and int16 rungs. int8 is left out: without VNNI it needs three instructions where int16 needs two.
#include "isa.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#define TMM_LANES 8
#define TMM_MULTIPLY_ADD(a, b, c) ((Floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "isa_generic.h"

namespace tmm {
namespace {

struct Int16Rung {
  using V = Ints;
  static void make_table(const ScanArgs& args, const float* bias) {
    for (int s = 0; s < args.num_scales; ++s)
      for (int v = 0; v < kVectors; ++v) {
        const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(bias + v * kLanes), _mm256_set1_ps(args.inverse_scale[s]));
        const __m256i rounded = _mm256_cvtps_epi32(_mm256_max_ps(scaled, _mm256_set1_ps(kInvalidBias)));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(args.bias_table + s * kPanel + v * kLanes), rounded);
      }
  }
  static const void* start(const ScanArgs& args, const float*, int64_t row) { return args.bias_table + args.scale_of[row] * kPanel; }
  static inline __attribute__((always_inline)) V broadcast(const int32_t* token) { return *token - Ints{}; }
  static inline __attribute__((always_inline)) V add(V sum, V code, V token) {
    return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)code, (__m256i)token));
  }
  static inline __attribute__((always_inline)) Ints top(V a, V b) { return larger(a, b); }
};

}  // namespace

const Isa* avx2_isa() {
  static const Isa isa = {"avx2",
                          kLanes,
                          kVectors,
                          {false, true, true, true},
                          {nullptr, scan<Int16Rung>, scan<FloatRung>, scan<DifferenceRung>},
                          centre<float>,
                          centre<double>,
                          {quantise<int8_t>, quantise<int16_t>},
                          largest,
                          collect,
                          score<float>,
                          score<double>,
                          tree_candidates,
                          nullptr};
  return &isa;
}

}  // namespace tmm

#else

namespace tmm {
const Isa* avx2_isa() { return nullptr; }
}  // namespace tmm

#endif
