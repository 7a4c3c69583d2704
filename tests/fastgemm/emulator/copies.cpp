// The copy engine and st.async: destinations hold garbage from the request until the data arrive, sources are read late.
#include <string.h>

#include <vector>

#include "emulator.h"
#include "scheduler.h"

namespace emulator {
namespace {

constexpr int kChunk = 16;           // bytes that a swizzle keeps together
constexpr int kStoreRowBytes = 128;  // of the box of a tensor store

std::vector<uint8_t> stores_of_element;
int64_t output_columns;

TensorMap decoded(const CUtensorMap* map) {
  TensorMap decoded;
  memcpy(&decoded, map, sizeof decoded);
  return decoded;
}

// 16 bytes of a row of the matrix; zeros outside.
void read_chunk(uint8_t* chunk, const TensorMap& map, int64_t row, int64_t first_byte) {
  const int64_t row_bytes = map.columns * map.element_bytes;
  memset(chunk, 0, kChunk);
  if (row < 0 || row >= map.rows || first_byte < 0 || first_byte >= row_bytes) return;
  const int64_t left = row_bytes - first_byte;
  memcpy(chunk, map.base + row * row_bytes + first_byte, left < kChunk ? left : kChunk);
}

void arrive_in_shared(Cta& cta, const TensorMap& map, uint32_t destination, int inner, int outer) {
  const int64_t box_bytes = static_cast<int64_t>(map.box_columns) * map.element_bytes;
  for (int y = 0; y < map.box_rows; ++y) {
    for (int64_t x = 0; x < box_bytes; x += kChunk) {
      uint8_t chunk[kChunk];
      read_chunk(chunk, map, static_cast<int64_t>(outer) + y, static_cast<int64_t>(inner) * map.element_bytes + x);
      const uint32_t linear = destination + static_cast<uint32_t>(y * box_bytes + x);
      memcpy(shared_at(cta, map.swizzled ? swizzle(linear) : linear, kChunk), chunk, kChunk);
    }
  }
}

void arrive_in_output(Cta& cta, const TensorMap& map, uint32_t source, int inner, int outer) {
  for (int y = 0; y < map.box_rows; ++y) {
    for (int x = 0; x < map.box_columns; ++x) {
      const int64_t row = static_cast<int64_t>(outer) + y;
      const int64_t column = static_cast<int64_t>(inner) + x;
      if (row < 0 || row >= map.rows || column < 0 || column >= map.columns) continue;
      const int64_t element = row * map.columns + column;
      const uint32_t from = swizzle(source + y * kStoreRowBytes + x * map.element_bytes);
      memcpy(map.base + element * map.element_bytes, shared_at(cta, from, map.element_bytes), map.element_bytes);
      if (map.columns != output_columns) fail("a tensor store into something else than the output");
      if (stores_of_element[element]++ != 0) fail("output %ld, %ld is stored twice", long(row), long(column));
    }
  }
}

}  // namespace

void watch_output(int64_t rows, int64_t columns) {
  stores_of_element.assign(rows * columns, 0);
  output_columns = columns;
}

void poison(uint8_t* destination, uint32_t bytes) { memset(destination, 0x40 | random_below(64), bytes); }

void tensor_load(uint32_t destination, const CUtensorMap* encoded, int inner, int outer, uint32_t barrier,
                 Destination destinations) {
  may_switch();
  const TensorMap map = decoded(encoded);
  if (destination % (map.swizzled ? 1024 : 128) != 0) fail("tensor load to the misaligned address %x", destination);
  const uint32_t bytes = map.box_rows * map.box_columns * map.element_bytes;
  const int first = destinations == kBothOfPair ? 0 : current->cta->rank;
  const int last = destinations == kBothOfPair ? 1 : current->cta->rank;
  for (int rank = first; rank <= last; ++rank) {
    Cta& cta = *current->cta->peers[rank];
    poison(shared_at(cta, destination, bytes), bytes);
    post(cta, kLoad, [=, &cta] {
      arrive_in_shared(cta, map, destination & kOffsetMask, inner, outer);
      complete_bytes(cta, barrier, bytes);
    });
  }
}

void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t barrier) {
  may_switch();
  if (destination % kChunk != 0 || reinterpret_cast<uintptr_t>(source) % kChunk != 0 || bytes % kChunk != 0)
    fail("bulk load of %u bytes to %x: not aligned", bytes, destination);
  Cta& cta = *current->cta;
  poison(shared_at(cta, destination, bytes), bytes);
  post(cta, kLoad, [=, &cta] {
    memcpy(shared_at(cta, destination, bytes), source, bytes);
    complete_bytes(cta, barrier, bytes);
  });
}

void store_remote_16(uint32_t address, uint32_t barrier, const int* words) {
  may_switch();
  Cta& cta = cta_at(address);
  if (address % kChunk != 0) fail("st.async to the misaligned address %x", address);
  if (&cta != &cta_at(barrier)) fail("the barrier of an st.async is in another CTA than its destination");
  struct Data {
    int words[4];
  } data;
  memcpy(data.words, words, kChunk);
  poison(shared_at(cta, address, kChunk), kChunk);
  post(cta, kRemoteStore, [=, &cta] {
    memcpy(shared_at(cta, address, kChunk), data.words, kChunk);
    complete_bytes(cta, barrier, kChunk);
  });
}

void tensor_store(const CUtensorMap* encoded, uint32_t source, int inner, int outer) {
  may_switch();
  const TensorMap map = decoded(encoded);
  if (source % 1024 != 0) fail("tensor store from the misaligned address %x", source);
  if (!map.swizzled || map.box_columns * map.element_bytes != kStoreRowBytes) fail("a box that stores do not have");
  Thread* thread = current;
  if (thread->open == nullptr) thread->open = std::make_shared<StoreGroup>();
  const std::shared_ptr<StoreGroup> group = thread->open;
  ++group->outstanding;
  Cta& cta = *thread->cta;
  post(cta, kStore, [=, &cta] {
    arrive_in_output(cta, map, source & kOffsetMask, inner, outer);
    --group->outstanding;
    thread->stores_read.wake();
  });
}

void bulk_commit() {
  if (current->open == nullptr) current->open = std::make_shared<StoreGroup>();
  current->committed.push_back(std::move(current->open));
  current->open = nullptr;
}

void bulk_wait_read(int pending) {
  may_switch();
  const auto outstanding = [pending] {
    int stores = 0;
    const int groups = static_cast<int>(current->committed.size()) - pending;
    for (int i = 0; i < groups; ++i) stores += current->committed[i]->outstanding;
    return stores;
  };
  while (outstanding() > 0) current->stores_read.block();
}

}  // namespace emulator
