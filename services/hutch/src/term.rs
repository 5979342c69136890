//! What is said to people, on stdout and stderr.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Writes one line to stdout. A reader that has gone away is no error.
pub(crate) fn line(text: impl Display) {
    let _ = writeln!(io::stdout().lock(), "{text}");
}

/// Writes text to stdout as it is.
pub(crate) fn text(text: impl Display) {
    let mut out = io::stdout().lock();
    let _ = write!(out, "{text}").and_then(|()| out.flush());
}

/// Writes one line to stderr, under the program's name.
pub(crate) fn note(text: impl Display) {
    let _ = writeln!(io::stderr().lock(), "hutch: {text}");
}

/// Says what went wrong, with its causes, and gives the exit code.
pub(crate) fn fail(error: &anyhow::Error, code: u8) -> ExitCode {
    note(format!("{error:#}"));
    ExitCode::from(code)
}

/// Text of others, safe to show on a terminal: control characters are escaped, but for line ends and tabs.
pub(crate) fn safe(text: &str) -> String {
    text.chars()
        .flat_map(|c| {
            let plain = !c.is_control() || matches!(c, '\n' | '\t');
            let escaped = (!plain).then(|| c.escape_default());
            plain.then_some(c).into_iter().chain(escaped.into_iter().flatten())
        })
        .collect()
}

/// A line on a terminal that says what is waited for; nothing in a pipe.
#[derive(Debug)]
pub(crate) struct Waiting {
    since: Instant,
    shown: bool,
}

impl Waiting {
    pub(crate) fn new() -> Self {
        Self { since: Instant::now(), shown: false }
    }

    /// Says what is waited for, and for how long already.
    pub(crate) fn show(&mut self, what: impl Display) {
        let waited = self.since.elapsed();
        if io::stderr().is_terminal() && waited > Duration::from_millis(500) {
            let mut err = io::stderr().lock();
            let _ = write!(err, "\r\x1b[K{what}, {}s", waited.as_secs()).and_then(|()| err.flush());
            self.shown = true;
        }
    }

    /// Takes the line away.
    pub(crate) fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let mut err = io::stderr().lock();
            let _ = write!(err, "\r\x1b[K").and_then(|()| err.flush());
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_others_reaches_the_terminal_s_ear() {
        assert_eq!(safe("a\tb\n"), "a\tb\n");
        assert_eq!(safe("\x1b[31mred\u{9b}"), "\\u{1b}[31mred\\u{9b}");
    }
}
