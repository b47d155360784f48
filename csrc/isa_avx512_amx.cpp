// AVX-512 with AMX: the int8 rung multiplies tiles of 16 tokens and 16 codes, 64 values at a time. All else is that of AVX-512.
#include "isa.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__linux__)

#include <sys/syscall.h>
#include <unistd.h>

#include "scan_512.h"

namespace tmm {
namespace {

constexpr int kRows = 16, kSteps = 16;        // of a tile register: tokens or, of codes, steps; and words
constexpr int kMostChunks = 32;               // tiles along a token: more, and AVX-512 takes it
constexpr int kPair = 2 * kRows;              // tokens of two tiles, which share what is loaded of the codes
static_assert(kBlockRows % kPair == 0, "whole pairs");

// Inline assembly, because the intrinsics do not say that they read memory. Registers 0 to 3: sums; 4, 5: tokens; 6, 7: codes.
#define TMM_LOAD_TILE(register, from, stride) \
  asm volatile("tileloadd (%0,%1,1), %%tmm" #register : : "r"(from), "r"(int64_t{stride}) : "memory")
#define TMM_STORE_TILE(register, to, stride) \
  asm volatile("tilestored %%tmm" #register ", (%0,%1,1)" : : "r"(to), "r"(int64_t{stride}) : "memory")
#define TMM_CLEAR_TILE(register) asm volatile("tilezero %tmm" #register)
#define TMM_MULTIPLY_TILES(sums, tokens, codes) asm volatile("tdpbsud %tmm" #codes ", %tmm" #tokens ", %tmm" #sums)

// Palette 1: every register has 16 rows of 64 bytes.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {kRows, kRows, kRows, kRows, kRows, kRows, kRows, kRows};
};
static_assert(sizeof(TileShapes) == 64, "the form that the processor reads");

// Sums of `chunks` tiles for 32 tokens and two vectors of codes. tokens: [chunk][kBlockRows][kSteps] words, from the first of them;
// codes: from the first narrow step; sums: [32][kVectors][kLanes]. coming: codes to fetch meanwhile, `lines` cache lines per tile.
inline __attribute__((always_inline)) void multiply_pair(const int32_t* tokens, const int32_t* codes, int64_t chunks, int32_t* sums,
                                                         const char* coming, int64_t lines) {
  TMM_CLEAR_TILE(0);
  TMM_CLEAR_TILE(1);
  TMM_CLEAR_TILE(2);
  TMM_CLEAR_TILE(3);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, tokens += kBlockRows * kSteps, codes += kSteps * kPanel) {
    for (int64_t line = 0; line < lines; ++line, coming += 64) _mm_prefetch(coming, _MM_HINT_T1);
    TMM_LOAD_TILE(6, codes, 4 * kPanel);
    TMM_LOAD_TILE(4, tokens, 4 * kSteps);
    TMM_MULTIPLY_TILES(0, 4, 6);
    TMM_LOAD_TILE(7, codes + kLanes, 4 * kPanel);
    TMM_MULTIPLY_TILES(1, 4, 7);
    TMM_LOAD_TILE(5, tokens + kRows * kSteps, 4 * kSteps);
    TMM_MULTIPLY_TILES(2, 5, 6);
    TMM_MULTIPLY_TILES(3, 5, 7);
  }
  TMM_STORE_TILE(0, sums, 4 * kPanel);
  TMM_STORE_TILE(1, sums + kLanes, 4 * kPanel);
  TMM_STORE_TILE(2, sums + kRows * kPanel, 4 * kPanel);
  TMM_STORE_TILE(3, sums + kRows * kPanel + kLanes, 4 * kPanel);
}

// The narrow words of all tokens by row, zeros behind them: what a tile of codes holds past the last step then counts for nothing.
void order_tokens(const ScanArgs& args, int64_t chunks, int32_t* rows) {
  __builtin_memset(rows, 0, static_cast<uint64_t>(chunks) * kBlockRows * kSteps * 4);
  for (int64_t tile = 0; tile < args.tiles; ++tile) {
    const int32_t* token = args.tokens + (tile * args.steps + args.wide) * kTileRows;
    for (int64_t step = 0; step < args.steps - args.wide; ++step, token += kTileRows) {
      int32_t* out = rows + (step / kSteps * kBlockRows + tile * kTileRows) * kSteps + step % kSteps;
      for (int r = 0; r < kTileRows; ++r) out[r * kSteps] = token[r];
    }
  }
}

void scan(const ScanArgs& args) {
  const int64_t chunks = (args.steps - args.wide + kSteps - 1) / kSteps, pairs = (args.tiles * kTileRows + kPair - 1) / kPair;
  if (chunks > kMostChunks) return avx512_isa()->scan[kInt8](args);
  // On the stack: 24 KB, and 6 KB for every chunk that there is.
  alignas(64) int32_t rows[kMostChunks * kBlockRows * kSteps];
  alignas(64) int32_t sums[kBlockRows * kPanel];
  order_tokens(args, chunks, rows);
  const TileShapes shapes;
  asm volatile("ldtilecfg %0" : : "m"(shapes));
  const uint8_t* tag = nullptr;
  for (int64_t panel = 0; panel < args.panels; ++panel) {
    const int32_t* codes = static_cast<const int32_t*>(args.codes) + panel * args.steps * kPanel;
    const int32_t* table = panel_biases(args, panel, tag);
    int32_t* groups = args.groups + panel / args.span * kLanes;
    const char* coming = reinterpret_cast<const char*>(codes + args.steps * kPanel);
    const int64_t calls = pairs * (kVectors / 2) * chunks, lines = (args.steps * kVectors + calls - 1) / calls;
    int64_t tile = 0;
    for (int64_t pair = 0; pair < pairs; ++pair) {
      for (int v = 0; v < kVectors; v += 2) {
        multiply_pair(rows + pair * kPair * kSteps, codes + args.wide * kPanel + v * kLanes, chunks,
                      sums + (pair * kPair * kVectors + v) * kLanes, coming, lines);
        coming += chunks * lines * 64;
      }
      const int64_t ready = pair + 1 < pairs ? (pair + 1) * kPair / kTileRows : args.tiles;
      for (; tile < ready; ++tile) {
        const uint8_t* scale_of = args.scale_of + tile * kTileRows;
        const int32_t* product = sums + tile * kTileRows * kPanel;
        __m512i sum[kTileRows][kVectors];
#pragma GCC unroll 6
        for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            sum[r][v] = _mm512_add_epi32(_mm512_loadu_si512(table + scale_of[r] * kPanel + v * kLanes),
                                         _mm512_load_si512(product + r * kPanel + v * kLanes));
        const __m512i* code = reinterpret_cast<const __m512i*>(codes);
        const int32_t* token = args.tokens + tile * args.steps * kTileRows;
        for (int64_t step = 0; step < args.wide; ++step, code += kVectors, token += kTileRows)
          add_step(sum, code, token, static_cast<const int16_t*>(nullptr));
        store_tops(sum, groups + tile * kTileRows * args.group_stride, args.group_stride, panel % args.span == 0, tag);
      }
    }
  }
  asm volatile("tilerelease");
}

// Linux gives a process the tile registers when it asks for them.
bool tiles_granted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

const Isa* avx512_amx_isa() {
  static const Isa isa = [] {
    Isa table = *avx512_isa();
    table.name = "avx512_amx";
    table.scan[kInt8] = scan;
    table.choice.cycles[kInt8] = 0.006f;
    return table;
  }();
  static const bool granted = tiles_granted();
  return granted ? &isa : nullptr;
}

}  // namespace tmm

#else

namespace tmm {
const Isa* avx512_amx_isa() { return nullptr; }
}  // namespace tmm

#endif
