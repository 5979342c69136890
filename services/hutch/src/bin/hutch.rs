//! `hutch`: one binary for everything.

fn main() -> std::process::ExitCode {
    hutch::main()
}
