// A forked child of a test, and what it said: a death test that needs no file, so that it runs where /tmp is read-only.
#pragma once

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <regex>
#include <string>

namespace snapstone::testing {

// What `function` says on stderr, in a child that has to end with exit code 0.
template <class Function>
std::string said_in_child(Function&& function) {
  std::array<int, 2> ends{};
  EXPECT_EQ(::pipe(ends.data()), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(60);
    ::dup2(ends[1], STDERR_FILENO);
    try {
      function();
      std::_Exit(0);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "threw %s\n", error.what());
    }
    std::_Exit(1);
  }
  ::close(ends[1]);
  std::string said;
  std::array<char, 4096> part{};
  for (ssize_t count = 0; (count = ::read(ends[0], part.data(), part.size())) > 0;) {
    said.append(part.data(), static_cast<std::size_t>(count));
  }
  ::close(ends[0]);
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << "status " << status << ": " << said;
  return said;
}

template <class Function>
void expect_child_says(const std::string& expression, Function&& function) {
  const std::string said = said_in_child(function);
  EXPECT_TRUE(std::regex_search(said, std::regex(expression))) << said << "is not " << expression;
}

}  // namespace snapstone::testing
