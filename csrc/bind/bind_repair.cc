// What diagnosis and repair of damaged checkpoints need of single chunks and files.
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "base/limits.h"
#include "bind/bind.h"
#include "codec/compress.h"
#include "codec/flipped_bit.h"
#include "os/directory.h"
#include "store/replacement.h"

namespace snapstone::bind {
namespace {

codec::Codec codec_of(std::uint16_t number) {
  if (!codec::known_codec(number)) throw std::invalid_argument("unknown codec " + std::to_string(number));
  return static_cast<codec::Codec>(number);
}

py::bytes decode_chunk(const py::bytes& stored, std::uint16_t codec, std::uint64_t raw_bytes) {
  if (raw_bytes > kChunkBytesMax) throw std::invalid_argument("raw_bytes is beyond the limit of a chunk");
  std::vector<std::uint8_t> raw(raw_bytes);
  const auto bytes = as_span(stored);
  {
    py::gil_scoped_release release;
    codec::decompress(bytes, codec_of(codec), raw);
  }
  return as_bytes(raw.data(), raw.size());
}

py::object encode_chunk(const py::bytes& raw, std::uint16_t codec, int level,
                        const std::optional<py::bytes>& reference) {
  const auto bytes = as_span(raw);
  const auto against = reference ? as_span(*reference) : std::span<const std::uint8_t>();
  std::vector<std::uint8_t> target(bytes.size());
  std::optional<std::uint64_t> nbytes;
  {
    py::gil_scoped_release release;
    nbytes = reference ? codec::compress(bytes, against, codec_of(codec), level, target.data())
                       : codec::compress(bytes, codec_of(codec), level, target.data());
  }
  if (!nbytes) return py::none();
  return as_bytes(target.data(), *nbytes);
}

py::tuple find_flipped_bit(const py::bytes& data, const py::bytes& digest, double seconds) {
  const auto bytes = as_span(data);
  const auto wanted = as_span(digest);
  codec::Digest canonical;
  if (wanted.size() != canonical.size()) throw std::invalid_argument("a digest has 16 bytes");
  std::ranges::copy(wanted, canonical.begin());
  codec::FlippedBit found;
  {
    py::gil_scoped_release release;
    found =
        codec::find_flipped_bit(bytes, canonical, std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1e3)));
  }
  return py::make_tuple(found.bit, found.complete);
}

void replace_file(const store::Staging& staging, const std::string& source, int checkpoint_fd, const std::string& path,
                  const std::string& name, const std::string& aside,
                  const std::optional<std::pair<std::uint64_t, std::uint64_t>>& damaged) {
  std::optional<store::Identity> identity;
  if (damaged) identity = store::Identity{damaged->first, damaged->second};
  py::gil_scoped_release release;
  store::replace_file(staging, source, os::open_directory_again(checkpoint_fd, path), name, aside, identity);
}

}  // namespace

void bind_repair(py::module_& module) {
  module.def("decode_chunk", &decode_chunk, py::arg("stored"), py::arg("codec"), py::arg("raw_bytes"),
             "The raw bytes of a chunk, or of an xor codec the difference; raises CorruptCheckpointError.");
  module.def("encode_chunk", &encode_chunk, py::arg("raw"), py::arg("codec"), py::arg("level"),
             py::arg("reference") = py::none(), "The stored bytes, or None when they would not be fewer than raw.");
  module.def("find_flipped_bit", &find_flipped_bit, py::arg("data"), py::arg("digest"), py::arg("seconds"),
             "(8 * byte + bit, or None; whether all were tried): see csrc/codec/flipped_bit.h.");
  module.def("replace_file", &replace_file, py::arg("staging"), py::arg("source"), py::arg("checkpoint_fd"),
             py::arg("path"), py::arg("name"), py::arg("aside"), py::arg("damaged") = py::none(),
             "`damaged`: (st_dev, st_ino). See csrc/store/replacement.h.");
}

}  // namespace snapstone::bind
