// The scan of isa.h on 256-bit registers, for files compiled with AVX2: a panel is 32 codes in two passes of 2 vectors of 8 lanes.
// A rung says how many rows it holds in registers and how it adds the steps of one pass to their sums.
#pragma once

#include <immintrin.h>

#include "isa.h"

namespace tmm {
namespace {

constexpr int kLanes = 8, kVectors = 4, kTile = 2, kPanel = kLanes * kVectors, kPass = kLanes * kTile;

inline __attribute__((always_inline)) __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __attribute__((always_inline)) void save(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }

inline void make_bias_table(const ScanArgs& args, const float* bias) {
  for (int s = 0; s < args.num_scales; ++s)
    for (int i = 0; i < kPanel; i += kLanes) {
      const __m256 scaled = _mm256_mul_ps(_mm256_loadu_ps(bias + i), _mm256_set1_ps(args.inverse_scale[s]));
      save(args.bias_table + s * kPanel + i, _mm256_cvtps_epi32(_mm256_max_ps(scaled, _mm256_set1_ps(kInvalidBias))));
    }
}

struct IntegerTop {
  static constexpr bool kInteger = true;
  static inline __attribute__((always_inline)) __m256i top(__m256i a, __m256i b) { return _mm256_max_epi32(a, b); }
};

struct FloatTop {
  static constexpr bool kInteger = false;
  static inline __attribute__((always_inline)) __m256i top(__m256i a, __m256i b) {  // float32 bits to an integer of the same order
    const __m256i larger = _mm256_castps_si256(_mm256_max_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b)));
    return _mm256_xor_si256(larger, _mm256_and_si256(_mm256_srai_epi32(larger, 31), _mm256_set1_epi32(0x7fffffff)));
  }
};

inline __attribute__((always_inline)) void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Place of a register tile: its words of the codes and of the tokens, and the steps to add. `ahead` is the distance in
// words to the next rows, whose words are fetched meanwhile: the tokens of a block do not fit the first-level cache.
struct Place {
  const int32_t* code;
  const int32_t* token;
  int64_t ahead;
  int64_t wide, narrow;  // steps of 2 int16 values and others: only the int8 rung has both

  inline __attribute__((always_inline)) void next() {
    prefetch(token + ahead);
    code += kPass;
    token += kTileRows;
  }
};

// One step at a time: sums[row][vector] += codes . token.
template <int kRows, class Add>
inline __attribute__((always_inline)) void add_steps(__m256i (&sum)[kRows][kTile], Place& at, int64_t steps, Add add) {
  for (int64_t step = 0; step < steps; ++step, at.next()) {
    const __m256i c0 = load(at.code), c1 = load(at.code + kLanes);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m256i t = _mm256_set1_epi32(at.token[r]);
      add(sum[r][0], c0, t);
      add(sum[r][1], c1, t);
    }
  }
}

// A rung without runs of steps.
template <class Top, void (*add_step)(__m256i&, __m256i, __m256i)>
struct Plain : Top {
  static constexpr int kRows = 6;
  static inline __attribute__((always_inline)) void add(__m256i (&sum)[kRows][kTile], Place& at) {
    add_steps<kRows>(sum, at, at.wide + at.narrow, add_step);
  }
};

// Steps that are added for all rows before the next steps: the codes of a pass then stay in the first-level cache. Chunks end at
// a multiple of 4 narrow steps, which a rung may rely on.
constexpr int64_t kChunk = 128;

template <class Rung>
void scan(const ScanArgs& args) {
  constexpr int kRows = Rung::kRows;
  alignas(32) int32_t partial[kBlockRows * kPass];
  const int64_t tile_words = args.steps * kTileRows;
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const float* bias = args.bias + panel * kPanel;
    if (Rung::kInteger) make_bias_table(args, bias);
    int32_t* groups = args.groups + panel / args.span * kLanes;
    for (int pass = 0; pass < kVectors / kTile; ++pass) {
      const int32_t* codes = static_cast<const int32_t*>(args.codes) + (panel * kVectors / kTile + pass) * args.steps * kPass;
      const int32_t* table = (Rung::kInteger ? args.bias_table : reinterpret_cast<const int32_t*>(bias)) + pass * kPass;
      const bool first = pass == 0 && panel % args.span == 0;
      for (int64_t from = 0, to; from < args.steps; from = to) {
        to = from + kChunk + (from ? 0 : args.wide % 4);
        to = to < args.steps ? to : args.steps;
        const int64_t wide = args.wide <= from ? 0 : args.wide < to ? args.wide - from : to - from;
        const int32_t* token = args.tokens + from * kTileRows;
        const int32_t* coming = codes + to * kPass;
        const int64_t slice = ((to - from) * kPass + args.tiles - 1) / args.tiles;
        for (int64_t tile = 0; tile < args.tiles; ++tile, token += tile_words) {
          for (const int32_t* end = coming + slice; coming < end; coming += kPass) prefetch(coming);
#pragma GCC unroll 2
          for (int part = 0; part < kTileRows; part += kRows) {
            const int64_t row = tile * kTileRows + part;
            __m256i sum[kRows][kTile];
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
              const int32_t* start = from             ? partial + (row + r) * kPass
                                     : Rung::kInteger ? table + args.scale_of[row + r] * kPanel
                                                      : table;
              sum[r][0] = load(start);
              sum[r][1] = load(start + kLanes);
            }
            Place at{codes + from * kPass, token + part, tile_words, wide, to - from - wide};
            Rung::add(sum, at);
            if (to < args.steps) {
#pragma GCC unroll 6
              for (int r = 0; r < kRows; ++r) {
                save(partial + (row + r) * kPass, sum[r][0]);
                save(partial + (row + r) * kPass + kLanes, sum[r][1]);
              }
              continue;
            }
            int32_t* out = groups + row * args.group_stride;
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r, out += args.group_stride) {
              __m256i top = Rung::top(sum[r][0], sum[r][1]);
              if (!first) top = _mm256_max_epi32(top, load(out));
              save(out, top);
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace tmm
