# Bundles as part of a CMake build, made again when what they are made from has changed.
#
#   include(SoraCompile.cmake)
#   sora_compile_bundle(film RECIPE film.yaml [OUTPUT folder] [FROZEN] [OPTIONS --gate structure …])
#
# adds the target `film`, which `all` depends on. The bundle is OUTPUT, `film` in the build folder if absent; its path is
# the target's property SORA_BUNDLE. RECIPE is a path from the folder of the CMakeLists.txt, or a shipped recipe's name.
# FROZEN takes nothing but what the recipe's lock has. SORA_COMPILE is the command, found in PATH unless it is set.
# For Ninja and Makefiles; other generators ask sora-compile whenever RECIPE itself changes.

cmake_minimum_required(VERSION 3.20)

if(NOT SORA_COMPILE)
  find_program(SORA_COMPILE sora-compile REQUIRED)
endif()

function(sora_compile_bundle name)
  cmake_parse_arguments(PARSE_ARGV 1 arg "FROZEN" "RECIPE;OUTPUT" "OPTIONS")
  if(NOT arg_RECIPE OR arg_UNPARSED_ARGUMENTS)
    message(FATAL_ERROR "sora_compile_bundle(${name}): expected RECIPE, and OUTPUT, FROZEN or OPTIONS")
  endif()
  if(NOT arg_OUTPUT)
    set(arg_OUTPUT "${name}")
  endif()
  get_filename_component(bundle "${arg_OUTPUT}" ABSOLUTE BASE_DIR "${CMAKE_CURRENT_BINARY_DIR}")
  get_filename_component(recipe "${arg_RECIPE}" ABSOLUTE BASE_DIR "${CMAKE_CURRENT_SOURCE_DIR}")
  if(NOT EXISTS "${recipe}")
    set(recipe "${arg_RECIPE}") # a shipped one's name
  endif()
  set(depends "")
  if(EXISTS "${recipe}")
    set(depends DEPENDS "${recipe}")
  endif()
  set(frozen "")
  if(arg_FROZEN)
    set(frozen --frozen)
  endif()
  add_custom_command(
    OUTPUT "${bundle}/manifest.json"
    COMMAND ${SORA_COMPILE} "${recipe}" -o "${bundle}" --depfile "${bundle}.d" ${frozen} ${arg_OPTIONS}
    ${depends}
    DEPFILE "${bundle}.d"
    COMMENT "Compiling ${arg_RECIPE} into ${arg_OUTPUT}"
    VERBATIM)
  add_custom_target("${name}" ALL DEPENDS "${bundle}/manifest.json")
  set_target_properties("${name}" PROPERTIES SORA_BUNDLE "${bundle}")
endfunction()
