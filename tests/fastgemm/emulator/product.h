// One product: its sizes, its plan, its random operands and the memory of its output.
#pragma once

#include <stdint.h>

#include <memory>
#include <string>
#include <vector>

#include "common/gemm_args.h"
#include "cuda_on_host.h"
#include "sm90/config.cuh"

namespace emulator {

// What distinguishes Int4Config, Int8Config, GroupedConfig and ZeroPointConfig here.
struct Kind {
  bool int4, grouped, zero_point;
};

struct Tile {
  int warpgroups, tokens;
};

// Memory aligned as CUDA aligns it.
class Buffer {
 public:
  Buffer() : Buffer(0) {}
  explicit Buffer(size_t bytes);
  uint8_t* bytes() const { return memory_.get(); }
  template <class Value>
  Value* as() const {
    return reinterpret_cast<Value*>(memory_.get());
  }

 private:
  std::unique_ptr<uint8_t, void (*)(void*)> memory_;
};

struct Product {
  Kind kind;
  fg::sm90::Plan plan;
  int multiprocessors;
  int64_t m, n, k;
  int out_dtype;
  bool has_bias, weights_ready;

  std::vector<int8_t> weight;  // [n, k], what `w` contains; with zero points unsigned
  std::vector<float> bias;     // [n], what `bias_bytes` contains
  Buffer x, x_scale, w, w_scale, bias_bytes, zero, x_sum;
  Buffer out;  // between two margins

  int element_bytes() const { return out_dtype == FG_F16 || out_dtype == FG_BF16 ? 2 : 4; }
  uint8_t* output() const;
  fg::GemmArgs arguments() const;
  std::string description() const;

  // Fails if a margin of the output has been written.
  void check_margins() const;
};

// The product of a seed: with the seed the tile, the way the plan divides the work and the number of tiles go through their
// combinations; the rest is random.
Product random_product(const Kind& kind, const std::vector<Tile>& tiles, uint64_t seed);


}  // namespace emulator
