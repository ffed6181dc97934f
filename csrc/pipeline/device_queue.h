// DeviceQueue: one device's share of a save, in the order of one stream.
//
//     wait for the producer -> table of work -> digests of whole chunks -> packed chunks gathered, group by group, and
//     their digests -> chunks to slots, or aside within the device first
//
// Everything of one device goes through one stream, so that each step finds what it needs of those before it, and
// memory that is used again (the scratch of a group) has been read by then. The host learns of ends by events.
//
// Ownership: the table is the workspace's; scratch and what was put aside are freed when the last copy out of them has
//            ended, or, with copies that may never end, not at all.
// Threads:   one at a time.
// Failure:   CudaError. No kernels, no memory for them, or none to put chunks aside: less is done on the device.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "codec/digest.h"
#include "cuda/copies.h"
#include "cuda/kernels.h"
#include "pipeline/device_options.h"
#include "pipeline/device_plan.h"
#include "pipeline/device_workspace.h"

namespace snapstone::pipeline {

class DeviceQueue {
 public:
  using Buffer = std::shared_ptr<cuda::DeviceBuffer>;

  // All arguments outlive the queue.
  DeviceQueue(const format::Layout& layout, const SaveSources& sources, const DevicePlan& plan, std::int32_t device,
              const DeviceOptions& options);
  ~DeviceQueue();
  DeviceQueue(const DeviceQueue&) = delete;
  DeviceQueue& operator=(const DeviceQueue&) = delete;

  // First, once: what follows runs after `producer`.
  void begin(const cuda::Event& producer, DeviceStats& stats);

  // Appends what brings a chunk's bytes on this device into `slot`, in the order of positions. Where a group has to be
  // gathered first, what `copies` holds is enqueued before that.
  void append_copies(std::uint32_t position, std::uint8_t* slot, std::vector<cuda::Copy>& copies, DeviceStats& stats);
  void enqueue(std::vector<cuda::Copy>& copies);  // and empties it
  // A chunk needs no copy: what it holds is known.
  void skip() { --unread_; }
  // What the copies of a chunk read that has to live until they ended; nothing if those are the tensors.
  Buffer give_up_buffer(std::uint32_t position) { return std::move(states_[position].buffer); }
  // Whether the chunk's bytes have nowhere been read to yet.
  bool in_tensors(std::uint32_t position) const { return states_[position].address == 0; }
  bool gathers(std::uint32_t position) const { return states_[position].in_group; }
  bool can_put_aside(std::uint32_t position) const {
    return mine(position) && in_tensors(position) && !states_[position].in_group;
  }
  // Copies chunks within the device. False, and nothing is enqueued, when there is no memory for that.
  bool put_aside(std::span<const std::uint32_t> positions, DeviceStats& stats);

  // Event of all that is enqueued so far.
  cuda::Event record(const char* why);
  // Whether everything that reads tensors of this device is enqueued.
  bool all_read() const { return unread_ == 0; }
  // Once all_read(): an event after all of that. Recorded by the first call, as late as that comes.
  const cuda::Event& sources_event();
  bool digests_done();  // of the chunks that are not packed
  // The digest that the device computed, once the copy of the chunk ended (of whole ones: once digests_done()).
  std::optional<codec::Digest> digest(std::uint32_t position) const;
  bool digests_whole_chunks() const { return digests_event_.has_value(); }

  std::uint64_t free_bytes() { return workspace_->device().free_bytes(); }
  std::int32_t ordinal() const { return ordinal_; }
  // Waits for all that was enqueued, which must have an end. False when that cannot be known: then everything that the
  // device may still use is given up for good.
  bool drain(std::chrono::milliseconds patience) noexcept;

 private:
  static constexpr std::uint32_t kNoDigest = UINT32_MAX;
  static constexpr std::uint64_t kNothing = UINT64_MAX;

  struct State {
    cuda::DevicePointer address = 0;  // where the chunk's bytes are by now, 0: in the tensors
    Buffer buffer;                    // that holds them
    std::uint32_t digest = kNoDigest;
    bool in_group = false;
  };
  // Packed chunks that share the scratch, one after the other.
  struct Group {
    std::vector<std::uint32_t> positions;
    std::uint64_t first_item = 0;  // of the table
    std::uint64_t item_count = 0;
    std::uint64_t item_bytes_max = 0;
    std::uint32_t first_digest = 0;
    std::uint32_t digest_count = 0;
  };

  cuda::Stream& stream() { return workspace_->stream(); }
  const DeviceChunk& chunk(std::uint32_t position) const { return plan_.chunks[position]; }
  bool mine(std::uint32_t position) const { return chunk(position).device == ordinal_ && !chunk(position).shared; }
  std::uint64_t raw_bytes(std::uint32_t position) const { return layout_.chunks[chunk(position).chunk].raw_bytes; }
  std::span<const format::Piece> pieces(std::uint32_t position) const {
    return pieces_of(layout_, chunk(position).chunk);
  }
  bool here(const format::Piece& piece) const { return sources_.device_of(piece.tensor) == ordinal_; }
  void join(std::vector<cuda::Copy>& copies, const cuda::Copy& copy, std::uint64_t source, std::uint64_t nbytes_max);
  void plan_kernels();
  std::vector<std::uint32_t> plan_groups();
  bool plan_table();
  void fill_table();
  void digest_whole_chunks(DeviceStats& stats);
  void gather_next_group(DeviceStats& stats);
  void digest_on_device(std::uint32_t first, std::uint32_t count);

  const format::Layout& layout_;
  const SaveSources& sources_;
  const DevicePlan& plan_;
  const std::int32_t ordinal_;
  const DeviceOptions& options_;
  std::unique_ptr<DeviceWorkspace> workspace_;
  const cuda::Kernels* kernels_ = nullptr;
  std::vector<State> states_;            // by position
  std::vector<std::uint32_t> digested_;  // positions, by number of the digest: whole chunks, then packed ones
  std::uint32_t whole_count_ = 0;
  std::vector<Group> groups_;
  std::size_t next_group_ = 0;
  Buffer scratch_;
  std::uint64_t item_count_ = 0;
  // Offsets in the table, which begins with the items of digests.
  std::uint64_t gather_items_at_ = 0;
  std::uint64_t zeros_at_ = 0;
  std::uint64_t digests_at_ = 0;
  std::uint64_t joined_ = kNothing;  // what the last copy reads: a tensor's number, or a buffer's address
  std::uint64_t unread_ = 0;         // chunks with bytes here that nothing enqueued so far reads
  std::optional<cuda::Event> digests_event_;
  std::optional<cuda::Event> sources_event_;
};

}  // namespace snapstone::pipeline
