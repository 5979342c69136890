//! `hutch`, without the defences that `HUTCH_WITHOUT` names: for the tests alone.

fn main() -> std::process::ExitCode {
    hutch::main()
}
