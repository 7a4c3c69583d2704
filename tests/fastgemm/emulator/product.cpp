// Random products: sizes around the corners of tiles, waves and pipeline steps; operands of all values.
#include "product.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <random>

#include "cuda_on_host.h"
#include "reference.h"

namespace emulator {
namespace {

constexpr size_t kMargin = 4096;
constexpr uint8_t kMarginByte = 0xEE;
constexpr int kFewTokens = 32;  // Config::kFewTokens

class Random {
 public:
  explicit Random(uint64_t seed) : generator_(seed) {}
  int below(int bound) { return static_cast<int>((generator_() >> 32) % bound); }
  bool coin() { return below(2) == 0; }
  int one_of(std::initializer_list<int> values) { return values.begin()[below(static_cast<int>(values.size()))]; }
  int8_t byte() { return static_cast<int8_t>(generator_() >> 56); }
  float scale() { return 1e-3f + below(10000) * 1e-6f; }

 private:
  std::mt19937_64 generator_;
};

struct Division {
  int split;
  fg::sm90::Share share;
};

Division division_of(uint64_t index, bool few) {
  using namespace fg::sm90;
  constexpr Division kMany[] = {{1, kShareNothing}, {2, kShareNothing}, {4, kShareNothing},
                                {8, kShareNothing}, {1, kShareTokens},  {1, kShareWeights}};
  constexpr Division kFew[] = {{1, kShareNothing}, {2, kShareNothing}, {4, kShareNothing},
                               {8, kShareNothing}, {3, kShareNothing}, {3, kShareNothing}};
  return few ? kFew[index % 6] : kMany[index % 6];
}

// Columns that launch() gives a pipeline step of this tile, where it has a choice one of them.
int columns_of_step(const Kind& kind, const Tile& tile, Random& random) {
  if (tile.warpgroups == 1) return kind.int4 || tile.tokens == 64 ? 256 : 128;
  if (kind.int4 && tile.tokens <= 16) return random.one_of({128, 256});
  return 128;
}

int64_t random_columns(const Kind& kind, const Tile& tile, int split, Random& random) {
  const int columns = columns_of_step(kind, tile, random);
  const bool few = tile.tokens <= kFewTokens;
  // Now and then fewer steps than the split asks for, or more than the pipeline has stages.
  int steps = random.below(6) == 0 ? 1 + random.below(3) : split + random.below(4);
  if (tile.tokens <= 128 && random.below(4) == 0) steps += random.below(12);
  const int64_t whole = static_cast<int64_t>(steps) * columns;
  if (few && columns == 256) return whole;
  if (kind.grouped) return columns == 256 && random.coin() ? whole - 128 : whole;
  return whole - 32 * random.below(4);
}

// Less than a wave of tiles, one wave, a little more, and several.
int tiles_of_amount(uint64_t amount, int wave, Random& random) {
  switch (amount % 4) {
    case 0:
      return wave == 1 ? 1 : 1 + random.below(wave - 1);
    case 1:
      return wave;
    case 2:
      return wave + 1 + random.below(2);
    default:
      return wave * 2 + random.below(wave + 1);
  }
}

void choose_sizes(Product& p, const Tile& tile, uint64_t amount, Random& random) {
  const bool few = tile.tokens <= kFewTokens;
  const int cluster = p.plan.share == fg::sm90::kShareNothing ? p.plan.split : 2;
  p.multiprocessors = cluster <= 2 ? cluster * (1 + random.below(2)) : cluster;
  const int tiles = tiles_of_amount(amount, p.multiprocessors, random);
  const int token_tiles = few ? 1 : 1 + random.below(tiles < 3 ? tiles : 3);
  const int row_tiles = (tiles + token_tiles - 1) / token_tiles;
  p.m = few ? 1 + random.below(tile.tokens) : token_tiles * tile.tokens;
  if (!few && random.coin()) p.m -= random.below(tile.tokens);
  p.n = row_tiles * 64 * tile.warpgroups;
  if (random.coin()) p.n -= 16 * random.below(4 * tile.warpgroups);
  p.k = random_columns(p.kind, tile, p.plan.split, random);
}

// Packed W4 layout v1 (docs/fastgemm.md): tiles of 64 x 64, in each 16 bytes for a lane of each of four warps.
void pack_int4(const Product& p, uint8_t* packed) {
  const int64_t column_tiles = (p.k + 63) / 64;
  for (int64_t row = 0; row < p.n; ++row) {
    for (int64_t column = 0; column < p.k; ++column) {
      const int64_t tile = row / 64 * column_tiles + column / 64;
      const int r = row % 64, c = column % 64;
      const int lane = r % 8 * 4 + c / 4 % 4;
      const int word = c / 32 * 2 + c / 16 % 2;
      const bool high = r / 8 % 2 == 0;
      const int nibble = p.weight[row * p.k + column] & 15;
      packed[tile * 2048 + r / 16 * 512 + lane * 16 + word * 4 + c % 4] |= high ? nibble << 4 : nibble;
    }
  }
}

void fill_weights(Product& p, Random& random) {
  p.weight.resize(p.n * p.k);
  for (int8_t& value : p.weight) {
    value = random.byte();
    if (p.kind.zero_point) value &= 15;
    else if (p.kind.int4) value >>= 4;
  }
  if (p.kind.int4) {
    p.w = Buffer((p.n + 63) / 64 * ((p.k + 63) / 64) * 2048);
    pack_int4(p, p.w.bytes());
  } else {
    p.w = Buffer(p.weight.size());
    memcpy(p.w.bytes(), p.weight.data(), p.weight.size());
  }
}

void fill_bias(Product& p, Random& random) {
  p.bias.resize(p.n);
  p.bias_bytes = Buffer(p.n * p.element_bytes());
  for (int64_t row = 0; row < p.n; ++row) {
    const uint32_t bits = output_bits(p.out_dtype, (random.below(2001) - 1000) * 0.01f);
    memcpy(p.bias_bytes.bytes() + row * p.element_bytes(), &bits, p.element_bytes());
    p.bias[row] = value_of_output_bits(p.out_dtype, bits);
  }
}

void fill_scales(Buffer& buffer, int64_t count, Random& random) {
  buffer = Buffer(count * sizeof(float));
  for (int64_t i = 0; i < count; ++i) buffer.as<float>()[i] = random.scale();
}

}  // namespace

Buffer::Buffer(size_t bytes) : memory_(nullptr, free) {
  constexpr size_t kAlignment = 256;
  const size_t allocated = (bytes / kAlignment + 1) * kAlignment;
  memory_.reset(static_cast<uint8_t*>(aligned_alloc(kAlignment, allocated)));
  memset(memory_.get(), 0, allocated);
}

uint8_t* Product::output() const { return out.bytes() + kMargin; }

fg::GemmArgs Product::arguments() const {
  fg::GemmArgs a{};
  a.x = x.as<int8_t>();
  a.x_scale = x_scale.as<float>();
  a.w = w.bytes();
  a.w_scale = w_scale.as<float>();
  a.bias = has_bias ? bias_bytes.bytes() : nullptr;
  a.out = output();
  a.m = m;
  a.n = n;
  a.k = k;
  a.out_dtype = out_dtype;
  a.weights_ready = weights_ready;
  return a;
}

std::string Product::description() const {
  char text[300];
  snprintf(text, sizeof text,
           "tile %dx%d split %d share %d group %d on %d multiprocessors, m %ld n %ld k %ld dtype %d bias %d ready %d",
           plan.warpgroups, plan.tokens, plan.split, plan.share, plan.group, multiprocessors, long(m), long(n), long(k),
           out_dtype, has_bias, weights_ready);
  return text;
}

void Product::check_margins() const {
  const uint8_t* before = out.bytes();
  const uint8_t* behind = output() + m * n * element_bytes();
  for (size_t i = 0; i < kMargin; ++i) {
    if (before[i] != kMarginByte) fail("written %zu bytes before the output", kMargin - i);
    if (behind[i] != kMarginByte) fail("written %zu bytes behind the output", i);
  }
}

Product random_product(const Kind& kind, const std::vector<Tile>& tiles, uint64_t seed) {
  Random random(seed);
  const Tile tile = tiles[seed % tiles.size()];
  const uint64_t round = seed / tiles.size();
  const Division division = division_of(round, tile.tokens <= kFewTokens);
  Product p{};
  p.kind = kind;
  p.plan = {tile.warpgroups, tile.tokens, division.split, division.share, random.one_of({1, 2, 3, 16})};
  choose_sizes(p, tile, round + round / 6, random);
  const bool plain = !kind.grouped && !kind.zero_point;  // the variants have neither raw sums nor biases
  p.out_dtype = plain && random.below(4) == 0 ? FG_I32 : random.one_of({FG_F16, FG_BF16, FG_F32});
  p.has_bias = plain && p.out_dtype != FG_I32 && random.coin();
  p.weights_ready = random.coin();

  p.x = Buffer(p.m * p.k);
  p.x_sum = Buffer(p.m * sizeof(int32_t));
  for (int64_t i = 0; i < p.m * p.k; ++i) {
    p.x.as<int8_t>()[i] = random.byte();
    p.x_sum.as<int32_t>()[i / p.k] += p.x.as<int8_t>()[i];
  }
  fill_weights(p, random);
  fill_scales(p.x_scale, p.m, random);
  fill_scales(p.w_scale, p.n * (kind.grouped ? p.k / fg::sm90::kGroupSize : 1), random);
  fill_bias(p, random);
  p.zero = Buffer(p.n);
  for (int64_t row = 0; row < p.n; ++row) p.zero.bytes()[row] = random.byte() & 15;
  const size_t output_bytes = p.m * p.n * p.element_bytes();
  p.out = Buffer(output_bytes + 2 * kMargin);
  memset(p.out.bytes(), kMarginByte, output_bytes + 2 * kMargin);
  return p;
}

}  // namespace emulator
