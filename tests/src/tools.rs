//! Tools from PyPI that `cargo xtask test` installs in `target/tools`, each in a virtual environment of its own.

use std::path::{Path, PathBuf};

/// Where a tool's command is, `HUTCH_TOOLS/NAME/bin/NAME` or the same below `target/tools`; none if it is not
/// installed.
#[must_use]
pub fn find(name: &str) -> Option<PathBuf> {
    let home = std::env::var_os("HUTCH_TOOLS")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/tools"), PathBuf::from);
    let command = home.join(name).join("bin").join(name);
    command.exists().then_some(command)
}
