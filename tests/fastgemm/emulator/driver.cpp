// emulator FIRST COUNT [TILE]: the products of seeds FIRST .. FIRST + COUNT - 1 through the real launch() on the emulator,
// each compared with the reference; of all tiles in turns, or of one ("1x64").  A line for each launch, at last OK; or FAIL
// and the reason, exit status 1.
//
// Built with -DEMULATED_KIND=Int4Config (or another kind of instances.cuh); -DEMULATED_TILE=1,64,256 compiles this instance
// alone, which takes a fraction of the time.
#include <stdio.h>
#include <stdlib.h>

#include <string>
#include <vector>

#include "cuda_runtime_host.h"
#include "reference.h"
#include "sm90/instances.cuh"

namespace {

using namespace fg::sm90;

#ifdef EMULATED_TILE
using Instance = EMULATED_KIND<EMULATED_TILE>;

std::vector<emulator::Tile> tiles() { return {{Instance::kWarpgroups, Instance::kTokens}}; }

int run(const fg::GemmArgs& arguments, const Plan& plan, const Extra& extra) {
  return launch<Instance>(arguments, plan, extra);
}
#else
using Instance = EMULATED_KIND<2, 8, kBoxK>;

// Those of launch_plan().
std::vector<emulator::Tile> tiles() {
  return {{2, 8}, {2, 16}, {2, 32}, {1, 64}, {2, 64}, {2, 96}, {1, 128}, {2, 128}, {2, 192}, {2, 256}};
}

int run(const fg::GemmArgs& arguments, const Plan& plan, const Extra& extra) {
  return launch_plan<EMULATED_KIND>(arguments, plan, extra);
}
#endif

std::vector<emulator::Tile> tiles_named(const std::string& name) {
  std::vector<emulator::Tile> named;
  for (const emulator::Tile& tile : tiles()) {
    if (std::to_string(tile.warpgroups) + "x" + std::to_string(tile.tokens) == name) named.push_back(tile);
  }
  if (named.empty()) emulator::fail("no tile %s", name.c_str());
  return named;
}

constexpr emulator::Kind kKind{Instance::kInt4, Instance::kGrouped, Instance::kZeroPoint};

void print_launch(const emulator::Product& product, const Params& p) {
  const char* const shares[] = {"nothing", "tokens", "weights"};
  const char* const dtypes[] = {"f16", "bf16", "i32", "f32"};
  const char* tiles = "mixed";
  if (p.whole_tiles == 0) tiles = "shared";
  if (p.whole_tiles == p.tiles) tiles = "whole";
  const int columns = (product.k + 127) / 128 == p.k_steps ? 128 : 256;
  printf("launch tile=%dx%d share=%s split=%d tiles=%s columns=%d stages=%d dtype=%s bias=%d ready=%d\n",
         product.plan.warpgroups, product.plan.tokens, shares[p.share], p.split, tiles, columns, p.stages,
         dtypes[product.out_dtype], product.has_bias, product.weights_ready);
}

void run_seed(const std::vector<emulator::Tile>& tiles, uint64_t seed) {
  const emulator::Product product = emulator::random_product(kKind, tiles, seed);
  emulator::set_context(("seed " + std::to_string(seed) + ", " + product.description()).c_str());
  emulator::seed_scheduler(seed, 1 + seed % 5);
  emulator::set_multiprocessors(product.multiprocessors);
  emulator::watch_output(product.m, product.n);
  Extra extra{};
  if (kKind.zero_point) {
    extra.zero = product.zero.bytes();
    extra.x_sum = product.x_sum.as<int32_t>();
  }
  const int code = run(product.arguments(), product.plan, extra);
  if (code != FG_OK) emulator::fail("launch() returns %d", code);
  product.check_margins();
  emulator::check_output(product, emulator::launched_params());
  print_launch(product, emulator::launched_params());
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3 && count != 4) {
    fprintf(stderr, "usage: %s FIRST_SEED COUNT [TILE]\n", arguments[0]);
    return 2;
  }
  const uint64_t first = strtoull(arguments[1], nullptr, 10);
  const uint64_t seeds = strtoull(arguments[2], nullptr, 10);
  const std::vector<emulator::Tile> used = count == 4 ? tiles_named(arguments[3]) : tiles();
  for (uint64_t seed = first; seed < first + seeds; ++seed) run_seed(used, seed);
  printf("OK %lu launches, %ld events\n", static_cast<unsigned long>(seeds), emulator::events());
  return 0;
}
