// The vectors of tree_search.h on NEON: four registers.
#include "isa.h"

#if defined(__aarch64__)

#include <arm_neon.h>

#include "tree_search.h"

namespace tmm {
namespace {

// Byte numbers that move the lanes of a mask of 4 to the front.
struct Fronts {
  alignas(64) uint8_t of[16][16];
  constexpr Fronts() : of() {
    for (int mask = 0; mask < 16; ++mask)
      for (int lane = 0, count = 0; lane < 4; ++lane)
        if (mask >> lane & 1) {
          for (int byte = 0; byte < 4; ++byte) of[mask][4 * count + byte] = static_cast<uint8_t>(4 * lane + byte);
          ++count;
        }
  }
};
constexpr Fronts kFronts;

struct Ints16 {
  int32x4_t a, b, c, d;
};
struct Floats16 {
  float32x4_t a, b, c, d;
};
struct Mask16 {
  uint32x4_t a, b, c, d;  // all bits of a lane, or none
};

struct Neon {
  using Ints = Ints16;
  using Floats = Floats16;
  using Mask = Mask16;

#define TMM_INLINE static inline __attribute__((always_inline))
#define TMM_ONE(type, call, x) type{call(x.a), call(x.b), call(x.c), call(x.d)}
#define TMM_TWO(type, call, x, y) type{call(x.a, y.a), call(x.b, y.b), call(x.c, y.c), call(x.d, y.d)}
#define TMM_THREE(type, call, x, y, z) \
  type{call(x.a, y.a, z.a), call(x.b, y.b, z.b), call(x.c, y.c, z.c), call(x.d, y.d, z.d)}

  TMM_INLINE Ints fill(int32_t x) {
    const int32x4_t v = vdupq_n_s32(x);
    return {v, v, v, v};
  }
  TMM_INLINE Floats fill(float x) {
    const float32x4_t v = vdupq_n_f32(x);
    return {v, v, v, v};
  }
  TMM_INLINE Floats floats(float x) { return fill(x); }
  TMM_INLINE Ints lanes() {
    const int32_t first[4] = {0, 1, 2, 3};
    const int32x4_t v = vld1q_s32(first);
    return {v, vaddq_s32(v, vdupq_n_s32(4)), vaddq_s32(v, vdupq_n_s32(8)), vaddq_s32(v, vdupq_n_s32(12))};
  }
  TMM_INLINE Ints load(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
  TMM_INLINE Floats load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
  TMM_INLINE Ints load_any(const int32_t* p) { return load(p); }
  TMM_INLINE Floats load_any(const float* p) { return load(p); }
  TMM_INLINE Floats load_first(const float* p, int n) {
    float values[16] = {};
    for (int i = 0; i < n; ++i) values[i] = p[i];
    return load(values);
  }
  TMM_INLINE void store(int32_t* p, Ints v) {
    vst1q_s32(p, v.a);
    vst1q_s32(p + 4, v.b);
    vst1q_s32(p + 8, v.c);
    vst1q_s32(p + 12, v.d);
  }
  TMM_INLINE void store_any(int32_t* p, Ints v) { store(p, v); }
  TMM_INLINE void store(float* p, Floats v) { store(reinterpret_cast<int32_t*>(p), as_ints(v)); }

  TMM_INLINE Floats sub(Floats x, Floats y) { return TMM_TWO(Floats, vsubq_f32, x, y); }
  TMM_INLINE Floats multiply(Floats x, Floats y) { return TMM_TWO(Floats, vmulq_f32, x, y); }
  TMM_INLINE Floats multiply_add(Floats x, Floats y, Floats z) { return TMM_THREE(Floats, vfmaq_f32, z, x, y); }
  TMM_INLINE Floats max(Floats x, Floats y) { return TMM_TWO(Floats, vmaxq_f32, x, y); }
  TMM_INLINE Floats absolute(Floats x) { return TMM_ONE(Floats, vabsq_f32, x); }
  TMM_INLINE Ints rounded(Floats x) { return TMM_ONE(Ints, vcvtnq_s32_f32, x); }
  TMM_INLINE Ints as_ints(Floats x) { return TMM_ONE(Ints, vreinterpretq_s32_f32, x); }
  TMM_INLINE float root(float x) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }

  TMM_INLINE Ints add(Ints x, Ints y) { return TMM_TWO(Ints, vaddq_s32, x, y); }
  TMM_INLINE Ints min(Ints x, Ints y) { return TMM_TWO(Ints, vminq_s32, x, y); }
  TMM_INLINE Ints either(Ints x, Ints y) { return TMM_TWO(Ints, vorrq_s32, x, y); }
  TMM_INLINE Ints merge(Ints x, Ints y, Ints bits) {  // y where bits are set
    const Mask m = TMM_ONE(Mask, vreinterpretq_u32_s32, bits);
    return TMM_THREE(Ints, vbslq_s32, m, y, x);
  }
  TMM_INLINE Ints sub_pairs(Ints x, Ints y) { return TMM_TWO(Ints, sub_halves, x, y); }
  TMM_INLINE Ints sub_or_zero(Ints x, Ints y) { return TMM_TWO(Ints, sub_halves_or_zero, x, y); }
  TMM_INLINE void add_squares(Ints& sum, Ints gap) { sum = TMM_TWO(Ints, add_two_squares, sum, gap); }

  TMM_INLINE Mask less(Ints x, Ints y) { return TMM_TWO(Mask, vcltq_s32, x, y); }
  TMM_INLINE Mask less(Floats x, Floats y) { return TMM_TWO(Mask, vcltq_f32, x, y); }
  TMM_INLINE Mask at_most(Ints x, Ints y) { return TMM_TWO(Mask, vcleq_s32, x, y); }
  TMM_INLINE Mask at_most(Floats x, Floats y) { return TMM_TWO(Mask, vcleq_f32, x, y); }
  TMM_INLINE Mask equal(Ints x, Ints y) { return TMM_TWO(Mask, vceqq_s32, x, y); }
  TMM_INLINE uint32_t bits(Mask m) {
    const uint8_t places[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    const uint16x8_t low = vcombine_u16(vmovn_u32(m.a), vmovn_u32(m.b)), high = vcombine_u16(vmovn_u32(m.c), vmovn_u32(m.d));
    const uint8x16_t found = vandq_u8(vcombine_u8(vmovn_u16(low), vmovn_u16(high)), vld1q_u8(places));
    return static_cast<uint32_t>(vaddv_u8(vget_low_u8(found)) | vaddv_u8(vget_high_u8(found)) << 8);
  }
  TMM_INLINE Ints choose(Mask m, Ints without, Ints with) { return TMM_THREE(Ints, vbslq_s32, m, with, without); }
  TMM_INLINE Floats choose(Mask m, Floats without, Floats with) { return TMM_THREE(Floats, vbslq_f32, m, with, without); }
  TMM_INLINE int32_t least(Ints v) { return vminvq_s32(vminq_s32(vminq_s32(v.a, v.b), vminq_s32(v.c, v.d))); }
  TMM_INLINE float least(Floats v) { return vminvq_f32(vminq_f32(vminq_f32(v.a, v.b), vminq_f32(v.c, v.d))); }
  // Writes the lanes of `mask` in order, and up to 16 values past them; returns how many there are.
  TMM_INLINE int64_t compress(int32_t* list, Ints v, Mask mask) {
    const uint32_t found = bits(mask);
    int32_t* end = front(list, v.a, found & 15);
    end = front(end, v.b, found >> 4 & 15);
    end = front(end, v.c, found >> 8 & 15);
    end = front(end, v.d, found >> 12);
    return end - list;
  }

 private:
  TMM_INLINE int32x4_t sub_halves(int32x4_t x, int32x4_t y) {
    return vreinterpretq_s32_s16(vsubq_s16(vreinterpretq_s16_s32(x), vreinterpretq_s16_s32(y)));
  }
  TMM_INLINE int32x4_t sub_halves_or_zero(int32x4_t x, int32x4_t y) {
    return vreinterpretq_s32_u16(vqsubq_u16(vreinterpretq_u16_s32(x), vreinterpretq_u16_s32(y)));
  }
  TMM_INLINE int32x4_t add_two_squares(int32x4_t sum, int32x4_t gap) {
    const int16x8_t g = vreinterpretq_s16_s32(gap);
    return vaddq_s32(sum, vpaddq_s32(vmull_s16(vget_low_s16(g), vget_low_s16(g)), vmull_high_s16(g, g)));
  }
  TMM_INLINE int32_t* front(int32_t* list, int32x4_t v, uint32_t mask) {
    const uint8x16_t order = vld1q_u8(kFronts.of[mask]);
    vst1q_s32(list, vreinterpretq_s32_u8(vqtbl1q_u8(vreinterpretq_u8_s32(v), order)));
    return list + __builtin_popcount(mask);
  }
};

}  // namespace

const TreeLoops kTreeNeon = {tree_candidates<Neon>, grid_candidates<Neon>};

}  // namespace tmm

#endif
