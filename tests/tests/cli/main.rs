//! The command line, as people use it. Those tests that run sandboxes are skipped, and counted, where
//! `hutch doctor` finds that none can be made.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

mod alone;
mod broker;
mod exec;
mod readme;
mod run;
mod up;

/// The first line that a service says on stderr; then it is killed.
fn first_line(mut command: Command) -> String {
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("spawn");
    let mut line = String::new();
    BufReader::new(child.stderr.take().expect("stderr")).read_line(&mut line).expect("line");
    child.kill().expect("kill");
    child.wait().expect("ended");
    line
}
