"""Bundles as part of a Bazel build.

A depfile has no place in Bazel: what a bundle is made from is listed in `recipe` and `srcs`, and nothing else is in the
sandbox. With `--frozen` nothing is fetched, and what differs from the lock fails.
"""

def _sora_bundle_impl(ctx):
    bundle = ctx.actions.declare_directory(ctx.attr.name)
    arguments = ctx.actions.args()
    arguments.add(ctx.file.recipe)
    arguments.add("-o", bundle.path)
    if ctx.attr.frozen:
        arguments.add("--frozen")
    arguments.add_all(ctx.attr.options)
    ctx.actions.run(
        executable = ctx.executable.sora_compile,
        arguments = [arguments],
        inputs = [ctx.file.recipe] + ctx.files.srcs,
        outputs = [bundle],
        use_default_shell_env = True,  # SORA_COMPILE_CACHE, of --action_env
        mnemonic = "SoraCompile",
        progress_message = "Compiling %{input}",
    )
    return [DefaultInfo(files = depset([bundle]), runfiles = ctx.runfiles([bundle]))]

sora_bundle = rule(
    implementation = _sora_bundle_impl,
    doc = "Compiles a recipe into a bundle: a folder.",
    attrs = {
        "recipe": attr.label(allow_single_file = [".yaml", ".json"], mandatory = True),
        "srcs": attr.label_list(
            allow_files = True,
            doc = "Everything else it reads: recipes that it extends, its lock, checkpoints with their configurations.",
        ),
        "frozen": attr.bool(default = True, doc = "Take nothing but what the recipe's lock has."),
        "options": attr.string_list(doc = "More of sora-compile's options."),
        "sora_compile": attr.label(
            executable = True,
            cfg = "exec",
            mandatory = True,
            doc = "The command, such as a py_console_script_binary of the package sora-compile.",
        ),
    },
)
