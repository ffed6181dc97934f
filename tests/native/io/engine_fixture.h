// What tests of the engines share: buffers with contents, directories that go away, and requests run to their end.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/limits.h"
#include "io/io_engine.h"
#include "os/directory.h"
#include "os/file.h"

namespace snapstone::io {

class Buffer {
 public:
  explicit Buffer(std::uint64_t nbytes, std::uint64_t seed = 0) : nbytes_(nbytes) {
    data_ = static_cast<std::uint8_t*>(::operator new(round_up(nbytes, kPageBytes), std::align_val_t{kPageBytes}));
    std::uint64_t state = seed * 0x9E3779B97F4A7C15 + 1;
    for (std::uint64_t i = 0; i < nbytes; ++i) {
      state = state * 6364136223846793005 + 1442695040888963407;
      data_[i] = seed == 0 ? 0 : static_cast<std::uint8_t>(state >> 56);
    }
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, std::align_val_t{kPageBytes}); }

  std::uint8_t* data() const { return data_; }
  std::uint64_t nbytes() const { return nbytes_; }
  std::span<const std::uint8_t> bytes() const { return {data_, nbytes_}; }

 private:
  std::uint8_t* data_;
  std::uint64_t nbytes_;
};

class TemporaryDirectory {
 public:
  explicit TemporaryDirectory(const std::string& parent = ::testing::TempDir()) {
    std::string name = parent + "/snapstone-io-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) {
      throw OsError(errno, "mkdtemp", name);
    }
    directory_ = os::open_directory(name);
  }
  TemporaryDirectory(const TemporaryDirectory&) = delete;
  TemporaryDirectory& operator=(const TemporaryDirectory&) = delete;
  ~TemporaryDirectory() { std::filesystem::remove_all(directory_.path); }

  const os::Directory& get() const { return directory_; }
  os::File create(const std::string& name, bool direct) const {
    return os::create_file(directory_.fd.get(), directory_.path, name, direct);
  }
  std::vector<std::uint8_t> content(const std::string& name) const {
    std::ifstream stream(directory_.path + "/" + name, std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
  }

 private:
  os::Directory directory_;
};

inline bool equal(std::span<const std::uint8_t> a, std::span<const std::uint8_t> b) { return std::ranges::equal(a, b); }

inline bool still_direct(const os::File& file) { return (::fcntl(file.fd.get(), F_GETFL) & O_DIRECT) != 0; }

inline Request transfer_request(bool write, const os::File& file, const Buffer& buffer, std::uint64_t offset = 0,
                                std::uint64_t token = 0) {
  Request request;
  request.write = write;
  request.file = &file;
  request.buffer = buffer.data();
  request.offset = offset;
  request.nbytes = static_cast<std::uint32_t>(buffer.nbytes());
  request.token = token;
  return request;
}

// Answers by token, after all requests went through the engine, as many in flight as it takes.
inline std::map<std::uint64_t, int> run_all(IoEngine& engine, const std::vector<Request>& requests) {
  std::map<std::uint64_t, int> answers;
  std::array<Completion, 5> completions;
  std::size_t next = 0;
  while (next < requests.size() || engine.in_flight() > 0) {
    while (next < requests.size() && engine.in_flight() < engine.capacity()) {
      engine.submit(requests[next++]);
    }
    const std::size_t count = engine.complete(completions, 1);
    for (const Completion& completion : std::span(completions).first(count)) {
      EXPECT_TRUE(answers.emplace(completion.token, completion.error_number).second) << "answered twice";
    }
  }
  return answers;
}

inline int run_one(IoEngine& engine, const Request& request) { return run_all(engine, {request}).at(request.token); }

}  // namespace snapstone::io
