// What tests ask of the fake driver besides the driver's own functions; for C++ with dlsym, for Python with ctypes.
//
// Device memory is reached from here without a stream, and at once: a test that does so while work is under way, or
// before it has seen the end of it, is a violation like any other.
#pragma once

#include <cstdint>

extern "C" {

// Bytes out of and into device memory. 0: done; else there is a violation about it.
int fakecuda_read(std::uint64_t address, void* target, std::uint64_t nbytes);
int fakecuda_write(std::uint64_t address, const void* source, std::uint64_t nbytes);

// Memory as torch's allocator hands it out: what is freed is given again at once, to the same stream, whatever other
// streams still do with it. Freeing puts 0xDE there, as the stream's next work: what the next owner would do.
// Memory that was not freed before ends captures of other streams, unless the thread has said that it is careful.
// 0: none left.
std::uint64_t fakecuda_alloc(int device, std::uint64_t nbytes, void* stream);
void fakecuda_free(std::uint64_t address);

// A stream like torch's: of normal priority, without ties to the legacy default stream (which is the null handle).
void* fakecuda_stream(int device);

// Work for a stream of `device`: bytes that are taken at the call and land when the stream comes to it; one byte
// repeated; and nothing for a while, as of a training step.
int fakecuda_enqueue_write(int device, void* stream, std::uint64_t address, const void* source, std::uint64_t nbytes);
int fakecuda_enqueue_fill(int device, void* stream, std::uint64_t address, int byte, std::uint64_t nbytes);
int fakecuda_enqueue_delay(int device, void* stream, std::uint64_t microseconds);
// And nothing until fakecuda_let_go(), which drains do, too.
int fakecuda_enqueue_hold(int device, void* stream);
void fakecuda_let_go();
// `rows` rows of `width` bytes from device memory to device memory of the same device, `pitch` bytes apart.
int fakecuda_enqueue_copy(int device, void* stream, std::uint64_t target, std::uint64_t source, std::uint64_t width,
                          std::uint64_t rows, std::uint64_t target_pitch, std::uint64_t source_pitch);

// The host is about to read or write these bytes itself: 0 if it may.
int fakecuda_host_access(const void* begin, std::uint64_t nbytes, int write);

// While a stream captures, no other thread may make calls that break captures, nor anybody wait across its border.
int fakecuda_capture(int device, void* stream, int on);

void fakecuda_drain();                   // until all work of all streams has ended, and the host has seen it
int fakecuda_fail(const char* rules);    // replaces the rules of FAKECUDA_FAIL; counts begin anew
int fakecuda_mode(const char* mode);     // "eager", "lazy", "chaos"
void fakecuda_seed(std::uint64_t seed);  // chaos begins anew
int fakecuda_violation_count();
const char* fakecuda_violations();  // one a line; valid until this thread's next call
const char* fakecuda_counters();    // JSON object of numbers; valid until this thread's next call
void fakecuda_reset();              // drains, then forgets counters, violations and fail rules
std::uint64_t fakecuda_pending();   // pieces of work that have not ended

}  // extern "C"
