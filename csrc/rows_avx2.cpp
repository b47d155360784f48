// Loops over rows on AVX2.
#include "rows.h"

#if defined(__AVX2__) && defined(__FMA__)

#include <immintrin.h>

#define TMM_LANES 8
#define TMM_MULTIPLY_ADD(a, b, c) ((Floats)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#include "rows_generic.h"

namespace tmm {
namespace {

Words multiply_halves(Words v) {
  return (Words)_mm256_mul_epu32((__m256i)v, _mm256_srli_epi64((__m256i)v, 32));
}

Floats reduce(const Floats* s) {
  const auto add = [](__m256 a, __m256 b) { return _mm256_hadd_ps(a, b); };
  const __m256 low = add(add((__m256)s[0], (__m256)s[1]), add((__m256)s[2], (__m256)s[3]));
  const __m256 high = add(add((__m256)s[4], (__m256)s[5]), add((__m256)s[6], (__m256)s[7]));
  return (Floats)_mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

uint32_t not_above(Floats v, float limit) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_set1_ps(limit), _CMP_NGT_UQ)));
}

Floats load_first(const float* p, int64_t count) {
  const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return (Floats)_mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), lanes));
}

}  // namespace

const RowKernels* row_kernels_8() { return &kKernels; }

}  // namespace tmm

#else

namespace tmm {
const RowKernels* row_kernels_8() { return nullptr; }
}  // namespace tmm

#endif
