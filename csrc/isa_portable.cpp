// Any CPU: the float32 rungs on 128-bit vectors.
#define TMM_LANES 4
#define TMM_MULTIPLY_ADD(a, b, c) ((a) * (b) + (c))
#include "isa_generic.h"

namespace tmm {

const Isa* portable_isa() {
  static const TreeLoops kTree = {tree_candidates, nullptr};
  static const Isa isa = {"portable",
                          kLanes,
                          kVectors,
                          kVectors,
                          {false, false, true, true},
                          {nullptr, nullptr, scan<FloatRung>, scan<DifferenceRung>},
                          0,
                          0,
                          1,
                          nullptr,
                          centre<float>,
                          centre<double>,
                          {quantise<int8_t>, quantise<int16_t>},
                          largest,
                          collect,
                          score<float>,
                          score<double>,
                          distances<float>,
                          distances<double>,
                          &kTree,
                          {{0, 0, 0.19f, 0.3f}, {8, 16384, 640}}};
  return &isa;
}

}  // namespace tmm
