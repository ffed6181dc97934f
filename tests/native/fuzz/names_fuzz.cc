// Names that a manifest may give to files: what is accepted is one component that leads nowhere.
#include "store/names.h"

#include <string>

#include "fuzz_target.h"

int snapstone::fuzz::run_input(const std::uint8_t* data, std::size_t size) {
  using namespace snapstone;
  using fuzz::require;
  const std::string name(reinterpret_cast<const char*>(data), size);
  if (store::is_file_name(name)) {
    require(!name.empty() && name.size() <= 128, "as long as a name may be");
    require(name.find_first_of(std::string("/\\\0\n %:", 7)) == std::string::npos, "one component, in plain letters");
    require(name != "." && name != ".." && name[0] != '.', "never hidden, never another directory");
  }
  if (store::is_save_id(name)) {
    require(store::is_staging_name(store::staging_name(name)), "a staging name of a save id is one");
    require(store::is_trash_name(store::trash_name(name)), "a trash name of a save id is one");
    require(name.find_first_not_of("0123456789abcdef") == std::string::npos && size == 32, "32 hex digits");
  }
  if (store::is_staging_name(name) || store::is_trash_name(name)) {
    require(!store::is_file_name(name) && name.find('/') == std::string::npos, "no name of a file");
  }
  return 0;
}
