// The definition of each kind of product, element by element.  Built with -ffp-contract=off.
#include "reference.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <string.h>

#include "cuda_on_host.h"

namespace emulator {
namespace {

int dot(const int8_t* x, const int8_t* w, int64_t count) {
  int sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * w[i];
  return sum;
}

// Rows of the operands that meet in one element, and their scales.
struct Element {
  const Product& p;
  int64_t token, row;

  const int8_t* x() const { return p.x.as<int8_t>() + token * p.k; }
  const int8_t* w() const { return p.weight.data() + row * p.k; }
  float x_scale() const { return p.x_scale.as<float>()[token]; }
  float group_scale(int64_t group) const { return p.w_scale.as<float>()[group * p.n + row]; }
};

int integer_sum(const Element& e) {
  const int sum = dot(e.x(), e.w(), e.p.k);
  return e.p.kind.zero_point ? sum - e.p.zero.bytes()[e.row] * e.p.x_sum.as<int32_t>()[e.token] : sum;
}

// Columns first .. last - 1 with their group scales, as multiply_grouped.cuh defines the sum.
float grouped_sum(const Element& e, int64_t first, int64_t last) {
  constexpr int kGroup = fg::sm90::kGroupSize;
  float total = 0;
  for (int64_t column = first; column < last; column += kGroup) {
    const int sum = dot(e.x() + column, e.w() + column, kGroup);
    total = __builtin_fmaf(static_cast<float>(16 * sum), e.group_scale(column / kGroup), total);
  }
  return total * 0.0625f;
}

// The sums of the CTAs of a cluster, added in the order of their ranks.
float grouped_sum_of_cluster(const Element& e, const fg::sm90::Params& params) {
  const int64_t columns = (e.p.k + 127) / 128 == params.k_steps ? 128 : 256;  // of a step
  float total = 0;
  for (int rank = 0; rank < params.split; ++rank) {
    const int64_t first = params.share_steps[rank] * columns;
    const int64_t last = params.share_steps[rank + 1] * columns;
    total = total + grouped_sum(e, first, last < e.p.k ? last : e.p.k);
  }
  return total;
}

uint32_t expected_bits(const Element& e) {
  const int sum = integer_sum(e);
  if (e.p.out_dtype == FG_I32) return static_cast<uint32_t>(sum);
  float value = static_cast<float>(sum) * e.x_scale();
  value = value * e.p.w_scale.as<float>()[e.row];
  if (e.p.has_bias) value = value + e.p.bias[e.row];
  return output_bits(e.p.out_dtype, value);
}

// Which tiles a cluster shares is the kernel's affair; where there are both kinds, either sum will do.
bool is_grouped_result(const Element& e, const fg::sm90::Params& params, uint32_t bits) {
  const auto matches = [&](float sum) { return bits == output_bits(e.p.out_dtype, sum * e.x_scale()); };
  if (params.whole_tiles > 0 && matches(grouped_sum(e, 0, e.p.k))) return true;
  return params.whole_tiles < params.tiles && matches(grouped_sum_of_cluster(e, params));
}

}  // namespace

uint32_t output_bits(int out_dtype, float value) {
  if (out_dtype == FG_F16) return fg::same_bits<uint16_t>(__float2half_rn(value));
  if (out_dtype == FG_BF16) return fg::same_bits<uint16_t>(__float2bfloat16_rn(value));
  return fg::same_bits<uint32_t>(value);
}

float value_of_output_bits(int out_dtype, uint32_t bits) {
  const uint16_t half = static_cast<uint16_t>(bits);
  if (out_dtype == FG_F16) return __half2float(fg::same_bits<__half>(half));
  if (out_dtype == FG_BF16) return __bfloat162float(fg::same_bits<__nv_bfloat16>(half));
  return fg::same_bits<float>(bits);
}

void check_output(const Product& p, const fg::sm90::Params& params) {
  for (int64_t token = 0; token < p.m; ++token) {
    for (int64_t row = 0; row < p.n; ++row) {
      const Element element{p, token, row};
      uint32_t bits = 0;
      memcpy(&bits, p.output() + (token * p.n + row) * p.element_bytes(), p.element_bytes());
      if (p.kind.grouped) {
        if (!is_grouped_result(element, params, bits)) fail("token %ld, row %ld: %x", long(token), long(row), bits);
        continue;
      }
      const uint32_t expected = expected_bits(element);
      if (bits != expected)
        fail("token %ld, row %ld: %x, should be %x", long(token), long(row), bits, expected);
    }
  }
}

}  // namespace emulator
