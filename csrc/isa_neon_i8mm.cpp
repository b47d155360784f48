// NEON with smmla, which multiplies 2 tokens x 8 bytes by 8 bytes x 2 codes: twice the products of sdot. All but the int8 rung is
// that of NEON.
#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_MATMUL_INT8)

#include "isa_neon.h"

namespace tmm {
namespace {

// Two tokens' sums of four codes, as two vectors of one token each or as two blocks of [token][code]: either way round.
inline __attribute__((always_inline)) void exchange(int32x4_t& a, int32x4_t& b) {
  const int64x2_t x = vreinterpretq_s64_s32(a), y = vreinterpretq_s64_s32(b);
  a = vreinterpretq_s32_s64(vzip1q_s64(x, y));
  b = vreinterpretq_s32_s64(vzip2q_s64(x, y));
}

// Inline assembly, because gcc 12 reorders the loads until the sums do not fit the registers.
inline __attribute__((always_inline)) void multiply_add(int32x4_t& sum, int8x16_t tokens, int8x16_t codes) {
  asm volatile("smmla %0.4s, %1.16b, %2.16b" : "+w"(sum) : "w"(tokens), "w"(codes));
}

// Steps come in twos: 8 dimensions of a code lie side by side (Isa::depth).
struct Blocks : IntegerTop {
  TMM_INLINE void add(Sums& sum, const int32_t* code, const int32_t* token, const ScanArgs& args) {
    add_words(sum, code, token, args.wide);
    code += args.wide * kPanel;
    token += args.wide * kTileRows;
#pragma GCC unroll 3
    for (int r = 0; r < kTileRows; r += 2)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) exchange(sum[r][v], sum[r + 1][v]);
    for (int64_t step = args.wide; step < args.steps; step += 2, code += 2 * kPanel, token += 2 * kTileRows) {
      const int32x4_t four = vld1q_s32(token), next_four = vld1q_s32(token + kTileRows);
      const int32x2_t two = vld1_s32(token + 4), next_two = vld1_s32(token + kTileRows + 4);
      const int8x16_t pairs[3] = {
          vreinterpretq_s8_s32(vzip1q_s32(four, next_four)), vreinterpretq_s8_s32(vzip2q_s32(four, next_four)),
          vreinterpretq_s8_s32(vcombine_s32(vzip1_s32(two, next_two), vzip2_s32(two, next_two)))};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int8x16_t low = vreinterpretq_s8_s32(vld1q_s32(code + 2 * v * kLanes));
        const int8x16_t high = vreinterpretq_s8_s32(vld1q_s32(code + (2 * v + 1) * kLanes));
#pragma GCC unroll 3
        for (int p = 0; p < 3; ++p) {
          multiply_add(sum[2 * p][v], pairs[p], low);
          multiply_add(sum[2 * p + 1][v], pairs[p], high);
        }
      }
    }
  }
  TMM_INLINE void finish(int32x4_t* top) {
    for (int r = 0; r < kTileRows; r += 2) exchange(top[r], top[r + 1]);
  }
};

}  // namespace

const Isa* neon_i8mm_isa() {
  static const Isa isa = [] {
    Isa table = *neon_isa();
    table.name = "neon_i8mm";
    table.has[kInt8] = true;
    table.scan[kInt8] = scan<Blocks>;
    table.depth = 2;
    table.choice.cycles[kInt8] = 0.021f;
    return table;
  }();
  return &isa;
}

}  // namespace tmm

#else

namespace tmm {
const Isa* neon_i8mm_isa() { return nullptr; }
}  // namespace tmm

#endif
