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

/// Text of others, safe to put into a line of ours: it can neither end the line, nor turn it around, nor be obeyed
/// by the terminal.
pub(crate) fn safe_line(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() || is_bidi(c) {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

/// Whether a character sets the direction of what is around it (Unicode Standard Annex 9, section 2).
fn is_bidi(c: char) -> bool {
    matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
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
        assert_eq!(safe_line("\x1b[31mred\u{9b}"), "\\u{1b}[31mred\\u{9b}");
    }

    #[test]
    fn a_line_of_ours_stays_one_line_and_runs_one_way() {
        assert_eq!(safe_line("a\nhutch: b\tc"), "a\\nhutch: b\\tc");
        for c in ['\u{200e}', '\u{200f}', '\u{202a}', '\u{202e}', '\u{2066}', '\u{2069}'] {
            assert_eq!(safe_line(&format!("x{c}y")), format!("x{}y", c.escape_default()));
        }
        assert_eq!(safe_line("ü \u{2065} 日本"), "ü \u{2065} 日本");
    }
}
