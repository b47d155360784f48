// The few loops that exist once per instruction set, behind one table of function pointers. The files that fill a table are
// compiled with that instruction set's flags and therefore use no inline code of the standard library: the linker could keep
// such a copy for everybody.
#pragma once

#include <cstdint>

namespace tmm {

constexpr int kTileRows = 6;      // tokens in a register tile
constexpr int kBlockRows = 96;    // tokens that share one pass over the packed codebook
constexpr int kReadAhead = 16;    // steps behind the last panel that a scan may read
constexpr float kTokenLevels = 127.0f;  // largest |q| of a token in the int8 rung
constexpr int kMaxTreeDim = 12;
constexpr int kLeaf = 16;         // codes in a leaf of the box tree, leaves in a super box
constexpr int kTreeBatch = 32;       // tokens searched together in a grid tree
constexpr int kTreeLeaves = 8192;    // leaves in reach of all of them,
constexpr int kTreeCandidates = 32;  // and codes of one: more, and a token is searched in the float32 tree
// Widths of the grid for 1 to 6 pairs of dimensions: a squared distance over all of them fits int32.
constexpr int32_t kGridWidth[] = {0, 32767, 23170, 18918, 16383, 14654, 13377};
constexpr int32_t kNoBox = 16384;         // a missing box is this far outside the grid in its first dimension: out of reach
constexpr float kFarthestReach = 2.6e8f;  // less than the square of that

enum Rung { kInt8 = 0, kInt16 = 1, kFloat32 = 2, kDifference = 3, kRungs = 4 };

// Integer scores: valid ones lie in [-2^30, 2^30], codes that must never win start here (see search.cpp for the ranges).
constexpr float kInvalidBias = -1610612736.0f;   // -1.5 * 2^30
constexpr int32_t kLowestValid = -1200000000;    // between the two ranges

// Scores of one block of tokens against all panels. A panel holds `vectors * lanes` codes, `tile` vectors at a time, as
// [vectors / tile][step][tile][lane] words of 32 bits (4 int8, 2 int16 or 1 float32 values of one code); code j of a panel is lane
// j / vectors of vector j % vectors, so the maximum over the vectors of one lane covers `vectors` consecutive codes: a group.
// Tokens are [tile][step][kTileRows] words.
struct ScanArgs {
  const void* codes;
  int64_t panels;
  int64_t steps;
  int64_t wide;                // int8 rung: this many of the steps, the first, hold 2 int16 values
  const float* bias;           // -|c|^2 / 2 by panel, vector, lane
  const int32_t* tokens;
  int64_t tiles;
  const float* inverse_scale;  // by scale: 1 / (s_x s_c), which turns a bias into integer units
  int num_scales;
  const uint8_t* scale_of;     // by token
  int32_t* bias_table;         // scratch: num_scales panels of int32
  int32_t* groups;             // by token: group maxima (for the float rungs: bits mapped to an integer of the same order)
  int64_t group_stride;
  int64_t span;                // consecutive panels folded into one set of groups
};

struct RowStats {
  float largest;  // max |out|
  double norm2;   // |row - mean|^2 from double precision differences, not scaled
};

struct QuantStats {
  float residual2;  // |x - scale * q|^2, accumulated in float32
  int32_t sum;      // sum of q
};

struct Best {
  double distance;
  int64_t index;
};

// Box tree over k codes: leaves of kLeaf codes, super boxes of kLeaf leaves. Bounds and leaves are [dim][kLeaf].
struct TreeView {
  int dim;
  int64_t supers;
  const float* super_bounds;  // [ceil(supers / kLeaf)][2][dim][kLeaf]
  const float* leaf_bounds;   // [supers][2][dim][kLeaf]
  const float* leaf_codes;    // [supers * kLeaf][dim][kLeaf]
  float slack;                // 1 + twice the relative error of a float32 distance or bound
};

// The same tree with codes and bounds rounded to 16-bit integers, two dimensions to a word: [ceil(dim / 2)][kLeaf] words in place
// of [dim][kLeaf] floats. Slots past the last code repeat it; super boxes past the last one are out of reach. See tree_search.h.
struct GridTree {
  float origin[16];  // q = round((value - origin) * unit) + centre, in [0, kGridWidth]
  float unit;        // 0: the grid is too coarse for these codes
  int32_t centre;
  float reach;       // |value - origin| * unit of a point on the grid, at most
  float slack;       // 2 e
  int64_t supers;
  const int32_t* super_bounds;
  const int32_t* leaf_bounds;
  const int32_t* leaf_codes;
};

// Measured costs of a search: they decide between methods that give the same answer.
struct TreeChoice {
  int most_dims;   // dimensions up to which the box tree is faster than a rung
  int64_t codes;   // codes from which it is,
  int64_t rows;    // and rows searched with one codebook from which its making pays
};
struct Choice {
  float cycles[kRungs];  // of one multiply-add of a scan
  TreeChoice tree;
};

struct TreeLoops {
  // Slots (leaf * kLeaf + lane) whose code may be the nearest or, with `two`, the second nearest; returns how many there are in
  // all, or -1 when float32 cannot tell (overflow, underflow, not a number).
  // scratch: floats for 2 * (supers + 2 * kLeaf) + (supers + 1) * kLeaf + capacity + kLeaf; out: capacity + kLeaf.
  int64_t (*candidates)(const TreeView&, const float* z, bool two, float* scratch, int32_t* out, int64_t capacity);
  // The same for `rows` <= kTreeBatch tokens in the grid tree: found[row] slots at slots[row * kTreeCandidates], or -1 where the
  // grid cannot tell. scratch: grid_scratch() words, aligned to 64 bytes. Null where there is none.
  void (*grid_candidates)(const GridTree&, int dim, const float* z, int64_t rows, bool two, int32_t* scratch, int32_t* slots,
                          int32_t* found);
};

struct Isa {
  const char* name;
  int lanes;
  int vectors;
  int tile;  // vectors in a pass; it divides `vectors`
  bool has[kRungs];
  void (*scan[kRungs])(const ScanArgs&);
  // int8 rung: the largest |q| of a code, which is stored as q + code_offset: code_levels + 1, without a sign, or 0. `depth` steps,
  // 1 or 2, of a code lie side by side: [vectors / tile][step / depth][tile][lane][depth]. The scale of a token is at least
  // max |x| / kTokenLevels and, where the rung has runs of steps, at least this, of `padded` values (a multiple of 16); else null.
  float code_levels;
  int code_offset, depth;
  float (*run_scale)(const float* x, int64_t padded);
  // out = (row - mean) * scale, zero-padded to a multiple of 16.
  RowStats (*centre_f32)(const float* row, const float* mean, float scale, int64_t d, float* out);
  RowStats (*centre_f64)(const double* row, const float* mean, float scale, int64_t d, float* out);
  // q = round(x / scale), int8 or int16, for `padded` values (a multiple of 16).
  QuantStats (*quantise[2])(const float* x, int64_t padded, float scale, void* out);
  // The largest value or, with `two`, one that at least two of them reach: the second largest maximum over a lane.
  int32_t (*largest)(const int32_t* values, int64_t n, bool two);
  // Positions of values >= threshold, at most `capacity` of them; returns how many there are in all.
  int64_t (*collect)(const int32_t* values, int64_t n, int32_t threshold, int32_t* out, int64_t capacity);
  // Lowers `best` to the lexicographic minimum of itself and (|z - codes[i]|^2, first + i) for the n rows of codes (n <= 4 is
  // fast). Eight partial sums in double precision, so that every instruction set gives the same bits; NaN never wins.
  void (*score_f32)(const float* z, const float* codes, int64_t n, int64_t d, int64_t first, Best* best);
  void (*score_f64)(const double* z, const double* codes, int64_t n, int64_t d, int64_t first, Best* best);
  // The same distances of n <= 4 rows of codes, infinity for NaN; false: all are above `limit` and out[0 .. 3] is not written.
  bool (*distances_f32)(const float* z, const float* codes, int64_t n, int64_t d, double limit, double* out);
  bool (*distances_f64)(const double* z, const double* codes, int64_t n, int64_t d, double limit, double* out);
  const TreeLoops* tree;
  Choice choice;
};

// A code whose float32 distance is above this one is farther than `limit`: float32 distances err by (d + 3) 2^-24, relative, and
// by the smallest float32 where they underflow. An overflow says farther than any float32, and NaN says nothing.
static inline double beyond(double limit, int64_t d) {
  const double count = static_cast<double>(d);
  return limit * (1 + (count + 8) * 0x1p-23) + count * 1e-44;
}

namespace {
// Starts of four codes: a short group repeats its last code, which changes no minimum.
struct Offsets {
  int64_t of[4];
  Offsets(int64_t n, int64_t d) : of{0, (n < 2 ? n - 1 : 1) * d, (n < 3 ? n - 1 : 2) * d, (n < 4 ? n - 1 : 3) * d} {}
};
}  // namespace

static inline int64_t grid_scratch(int64_t supers) {
  const int64_t blocks = (supers + kLeaf - 1) / kLeaf;
  return (kTreeBatch * blocks + 1) * kLeaf + (kTreeLeaves + 2 * kLeaf) * (kLeaf + 2);
}

const Isa* avx512_amx_isa();  // needs avx512_isa() too; null where the system withholds the tile registers
const Isa* avx512_isa();    // null where the compiler does not know it
const Isa* avx_vnni_isa();  // needs avx2_isa() too
const Isa* avx2_isa();
const Isa* neon_i8mm_isa();  // needs neon_isa() too
const Isa* neon_dot_isa();   // the same
const Isa* neon_isa();
const Isa* portable_isa();
const Isa* current_isa();   // the one that codebooks made now get
extern const TreeLoops kTreeAvx512, kTreeAvx2, kTreeNeon;

}  // namespace tmm
