// The scan of isa.h on 128-bit registers, for the isa_neon*.cpp files: a panel is 16 codes, 4 vectors of 4 lanes, and the sums of
// 6 tokens and 4 vectors stay in 24 of the 32 registers. A rung adds all steps of a panel to the sums of a tile.
#pragma once

#include <arm_neon.h>

#include "isa.h"

namespace tmm {
namespace {

constexpr int kLanes = 4, kVectors = 4, kPanel = kLanes * kVectors;

typedef int32x4_t Sums[kTileRows][kVectors];

#define TMM_INLINE static inline __attribute__((always_inline))

// Bias tables of one panel in integer units, one per scale.
inline void make_bias_table(const ScanArgs& args, const float* bias) {
  for (int s = 0; s < args.num_scales; ++s)
    for (int i = 0; i < kPanel; i += kLanes) {
      const float32x4_t scaled = vmulq_n_f32(vld1q_f32(bias + i), args.inverse_scale[s]);
      vst1q_s32(args.bias_table + s * kPanel + i, vcvtnq_s32_f32(vmaxq_f32(scaled, vdupq_n_f32(kInvalidBias))));
    }
}

struct IntegerTop {
  static constexpr bool kInteger = true;
  TMM_INLINE int32x4_t top(const int32x4_t* sum) { return vmaxq_s32(vmaxq_s32(sum[0], sum[1]), vmaxq_s32(sum[2], sum[3])); }
  TMM_INLINE void finish(int32x4_t*) {}
};

inline __attribute__((always_inline)) float32x4_t floats(int32x4_t v) { return vreinterpretq_f32_s32(v); }

struct FloatTop {
  static constexpr bool kInteger = false;
  TMM_INLINE int32x4_t top(const int32x4_t* sum) {  // float32 bits to an integer of the same order
    const float32x4_t a = vmaxq_f32(floats(sum[0]), floats(sum[1])), b = vmaxq_f32(floats(sum[2]), floats(sum[3]));
    const int32x4_t bits = vreinterpretq_s32_f32(vmaxq_f32(a, b));
    return veorq_s32(bits, vandq_s32(vshrq_n_s32(bits, 31), vdupq_n_s32(0x7fffffff)));
  }
  TMM_INLINE void finish(int32x4_t*) {}
};

// A statement for each of the tokens of a tile: the lane of an instruction is a constant. `four` holds the words of tokens 0 to 3,
// `two` those of 4 and 5.
#define TMM_EACH_ROW(call) \
  call(0, four, 0, laneq) call(1, four, 1, laneq) call(2, four, 2, laneq) call(3, four, 3, laneq) call(4, two, 0, lane) call(5, two, 1, lane)

// Steps of 2 int16 values: dimension by dimension, for 8 codes of two vectors.
inline __attribute__((always_inline)) void add_words(Sums& sum, const int32_t* code, const int32_t* token, int64_t steps) {
  for (int64_t step = 0; step < steps; ++step, code += kPanel, token += kTileRows) {
    const int16x8_t four = vreinterpretq_s16_s32(vld1q_s32(token));
    const int16x4_t two = vreinterpret_s16_s32(vld1_s32(token + 4));
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v += 2) {
      const int16x8_t a = vreinterpretq_s16_s32(vld1q_s32(code + v * kLanes));
      const int16x8_t b = vreinterpretq_s16_s32(vld1q_s32(code + (v + 1) * kLanes));
      const int16x8_t even = vuzp1q_s16(a, b), odd = vuzp2q_s16(a, b);
#define TMM_ADD(row, tokens, word, lane)                                                                   \
  sum[row][v] = vmlal_##lane##_s16(sum[row][v], vget_low_s16(even), tokens, 2 * word);                     \
  sum[row][v + 1] = vmlal_high_##lane##_s16(sum[row][v + 1], even, tokens, 2 * word);                      \
  sum[row][v] = vmlal_##lane##_s16(sum[row][v], vget_low_s16(odd), tokens, 2 * word + 1);                  \
  sum[row][v + 1] = vmlal_high_##lane##_s16(sum[row][v + 1], odd, tokens, 2 * word + 1);
      TMM_EACH_ROW(TMM_ADD)
#undef TMM_ADD
    }
  }
}

struct Words : IntegerTop {
  TMM_INLINE void add(Sums& sum, const int32_t* code, const int32_t* token, const ScanArgs& args) {
    add_words(sum, code, token, args.steps);
  }
};

// The float rungs are inline assembly, because gcc 12 reorders the loads until the sums do not fit the registers.
struct Products : FloatTop {
  TMM_INLINE void add(Sums& sum, const int32_t* code, const int32_t* token, const ScanArgs& args) {
    for (int64_t step = 0; step < args.steps; ++step, code += kPanel, token += kTileRows) {
      const int32x4_t four = vld1q_s32(token);
      const int32x2_t two = vld1_s32(token + 4);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const int32x4_t c = vld1q_s32(code + v * kLanes);
#define TMM_ADD(row, tokens, word, lane) \
  asm volatile("fmla %0.4s, %1.4s, %2.s[" #word "]" : "+w"(sum[row][v]) : "w"(c), "w"(tokens));
        TMM_EACH_ROW(TMM_ADD)
#undef TMM_ADD
      }
    }
  }
};

// Minus the sum of squared differences.
struct Differences : FloatTop {
  TMM_INLINE void add(Sums& sum, const int32_t* code, const int32_t* token, const ScanArgs& args) {
    for (int64_t step = 0; step < args.steps; ++step, code += kPanel, token += kTileRows) {
      int32x4_t c[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) c[v] = vld1q_s32(code + v * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const int32x4_t t = vld1q_dup_s32(token + r);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          int32x4_t gap;
          asm volatile("fsub %1.4s, %2.4s, %3.4s\n\tfmls %0.4s, %1.4s, %1.4s" : "+w"(sum[r][v]), "=&w"(gap) : "w"(c[v]), "w"(t));
        }
      }
    }
  }
};

template <class Rung>
void scan(const ScanArgs& args) {
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const int32_t* codes = static_cast<const int32_t*>(args.codes) + panel * args.steps * kPanel;
    const float* bias = args.bias + panel * kPanel;
    if (Rung::kInteger) make_bias_table(args, bias);
    const bool first = panel % args.span == 0;
    int32_t* groups = args.groups + panel / args.span * kLanes;
    for (int64_t tile = 0; tile < args.tiles; ++tile) {
      const uint8_t* scale_of = args.scale_of + tile * kTileRows;
      Sums sum;
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) {
        const int32_t* start = Rung::kInteger ? args.bias_table + scale_of[r] * kPanel : reinterpret_cast<const int32_t*>(bias);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[r][v] = vld1q_s32(start + v * kLanes);
      }
      Rung::add(sum, codes, args.tokens + tile * args.steps * kTileRows, args);
      int32x4_t top[kTileRows];
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r) top[r] = Rung::top(sum[r]);
      Rung::finish(top);
      int32_t* out = groups + tile * kTileRows * args.group_stride;
#pragma GCC unroll 6
      for (int r = 0; r < kTileRows; ++r, out += args.group_stride)
        vst1q_s32(out, first ? top[r] : vmaxq_s32(top[r], vld1q_s32(out)));
    }
  }
}

}  // namespace
}  // namespace tmm
