// NEON with sdot, which adds four products of bytes to each lane. All but the int8 rung is that of NEON.
#include "isa.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include "isa_neon.h"

namespace tmm {
namespace {

struct Bytes : IntegerTop {
  TMM_INLINE void add(Sums& sum, const int32_t* code, const int32_t* token, const ScanArgs& args) {
    add_words(sum, code, token, args.wide);
    code += args.wide * kPanel;
    token += args.wide * kTileRows;
    for (int64_t step = args.wide; step < args.steps; ++step, code += kPanel, token += kTileRows) {
      const int8x16_t four = vreinterpretq_s8_s32(vld1q_s32(token));
      const int8x8_t two = vreinterpret_s8_s32(vld1_s32(token + 4));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int8x16_t c = vreinterpretq_s8_s32(vld1q_s32(code + v * kLanes));
#define TMM_ADD(row, tokens, word, lane) sum[row][v] = vdotq_##lane##_s32(sum[row][v], c, tokens, word);
        TMM_EACH_ROW(TMM_ADD)
#undef TMM_ADD
      }
    }
  }
};

}  // namespace

const Isa* neon_dot_isa() {
  static const Isa isa = [] {
    Isa table = *neon_isa();
    table.name = "neon_dot";
    table.has[kInt8] = true;
    table.scan[kInt8] = scan<Bytes>;
    table.choice.cycles[kInt8] = 0.035f;
    return table;
  }();
  return &isa;
}

}  // namespace tmm

#else

namespace tmm {
const Isa* neon_dot_isa() { return nullptr; }
}  // namespace tmm

#endif
