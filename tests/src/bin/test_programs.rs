//! Compiles the tests' programs in C and prints the directory that has them, for a machine without a compiler.

use std::io::Write as _;

fn main() -> std::io::Result<()> {
    let layer = hutch_tests::programs::layer().ok_or_else(|| std::io::Error::other("no programs"))?;
    writeln!(std::io::stdout(), "{}", layer.display())
}
