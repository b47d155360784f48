// Loops over rows on AVX-512.
#include "rows.h"

#if defined(__AVX512F__) && defined(__AVX512DQ__)

#include "mask_512.h"

#define TMM_LANES 16
#define TMM_MULTIPLY_ADD(a, b, c) ((Floats)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#include "rows_generic.h"

namespace tmm {
namespace {

Words multiply_halves(Words v) {
  return (Words)_mm512_mul_epu32((__m512i)v, _mm512_srli_epi64((__m512i)v, 32));
}

// Quarter q of the result: the sums of a, b, c, d down to four lanes each, for q = 0 .. 3.
inline __attribute__((always_inline)) __m512 quarters(Floats a, Floats b, Floats c, Floats d) {
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)a, (__m512)b, 0x44), _mm512_shuffle_f32x4((__m512)a, (__m512)b, 0xee));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4((__m512)c, (__m512)d, 0x44), _mm512_shuffle_f32x4((__m512)c, (__m512)d, 0xee));
  return _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
}

inline __attribute__((always_inline)) __m512 pairs(__m512 a, __m512 b) {
  return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

Floats reduce(const Floats* s) {
  const __m512 low = pairs(quarters(s[0], s[4], s[8], s[12]), quarters(s[1], s[5], s[9], s[13]));
  const __m512 high = pairs(quarters(s[2], s[6], s[10], s[14]), quarters(s[3], s[7], s[11], s[15]));
  return (Floats)_mm512_add_ps(_mm512_shuffle_ps(low, high, 0x44), _mm512_shuffle_ps(low, high, 0xee));
}

uint32_t not_above(Floats v, float limit) {
  return bits_of(_mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_NGT_UQ));
}

Floats load_first(const float* p, int64_t count) {
  return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), p);
}

}  // namespace

const RowKernels* row_kernels_16() { return &kKernels; }

}  // namespace tmm

#else

namespace tmm {
const RowKernels* row_kernels_16() { return nullptr; }
}  // namespace tmm

#endif
