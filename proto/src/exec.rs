//! One more program in a running job: what is asked for, and what is said while it runs.
//!
//! The conversation is a sequence of messages, of one form everywhere between `hutch exec` and the sandbox: one byte that
//! says what it is, and the bytes themselves. `0` is typed by the caller; `1` and `2` are what the program writes to
//! stdout and stderr; `3` is an [`ExecWord`] as JSON. The caller's first message is [`ExecWord::Start`]; the last one of
//! all is [`ExecWord::Ended`] or [`ExecWord::Refused`]. Who hangs up before ends the program.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{Problem, SpecError};

/// The most bytes of a message that asks for a program.
pub const MAX_EXEC_START_BYTES: usize = 4 << 20;
/// The most bytes of any other.
pub const MAX_EXEC_BYTES: usize = 64 << 10;

/// A program for a running job. It has the job's user, and every restriction of the job's own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecSpec {
    /// Program and arguments; no shell. Looked up in the job's `PATH`.
    pub command: Vec<String>,
    /// Added to the job's environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where it runs; by default where the job's program does. Made if missing.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Its terminal, if it is to have one.
    #[serde(default)]
    pub tty: Option<TtySize>,
}

/// How large a terminal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TtySize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// What is said beside the bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ExecWord {
    /// The caller: run this.
    Start(ExecSpec),
    /// The caller: the terminal has another size.
    Resize(TtySize),
    /// The caller: there is no more input.
    StdinEnd,
    /// The program has ended; as a shell would say it: 127 and 126 if there was none or it cannot be run, 128+n for a signal.
    Ended {
        /// Its exit code.
        exit_code: i32,
    },
    /// It was not run.
    Refused {
        /// Why.
        why: ExecRefusal,
        /// The same in words.
        message: String,
    },
}

/// Why a program was not run in a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecRefusal {
    /// The job does not run, or not any more.
    NotRunning,
    /// What was asked for is wrong.
    Invalid,
    /// The worker or its host failed.
    HostError,
}

/// A message of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecMessage {
    /// Bytes for the program's stdin, or typed at its terminal.
    Stdin(Vec<u8>),
    /// What it wrote to stdout, or shows on its terminal.
    Stdout(Vec<u8>),
    /// What it wrote to stderr.
    Stderr(Vec<u8>),
    /// A word.
    Word(ExecWord),
}

impl ExecMessage {
    /// The message as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let json;
        let (kind, bytes) = match self {
            Self::Stdin(bytes) => (0, bytes.as_slice()),
            Self::Stdout(bytes) => (1, bytes.as_slice()),
            Self::Stderr(bytes) => (2, bytes.as_slice()),
            Self::Word(word) => {
                // It is made of texts and numbers, which always are JSON.
                json = serde_json::to_vec(word).unwrap_or_default();
                (3, json.as_slice())
            }
        };
        [&[kind], bytes].concat()
    }

    /// The message of these bytes.
    ///
    /// # Errors
    /// [`SpecError::NotJson`] for what is no message at all; [`SpecError::Invalid`] for a word that is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, SpecError> {
        let (kind, rest) = bytes.split_first().ok_or_else(|| {
            SpecError::NotJson("the message is empty: its first byte says what it is".to_owned())
        })?;
        if rest.len() > MAX_EXEC_BYTES && *kind != 3 || rest.len() > MAX_EXEC_START_BYTES {
            let most = if *kind == 3 { MAX_EXEC_START_BYTES } else { MAX_EXEC_BYTES };
            return Err(SpecError::Invalid(vec![Problem::new(
                "",
                format!("the message has {} bytes, at most {most} may be sent at once", rest.len()),
            )]));
        }
        match kind {
            0 => Ok(Self::Stdin(rest.to_vec())),
            1 => Ok(Self::Stdout(rest.to_vec())),
            2 => Ok(Self::Stderr(rest.to_vec())),
            3 => crate::parse::object(rest).map(Self::Word),
            other => Err(SpecError::NotJson(format!(
                "a message begins with 0 (stdin), 1 (stdout), 2 (stderr) or 3 (JSON), not {other}"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_itself_again() {
        let start = ExecSpec {
            command: vec!["ls".to_owned(), "-l".to_owned()],
            env: BTreeMap::from([("A".to_owned(), "b".to_owned())]),
            cwd: Some("/tmp".to_owned()),
            tty: Some(TtySize { rows: 24, columns: 80 }),
        };
        for message in [
            ExecMessage::Stdin(vec![]),
            ExecMessage::Stdout(b"a\0b".to_vec()),
            ExecMessage::Stderr(vec![255; MAX_EXEC_BYTES]),
            ExecMessage::Word(ExecWord::Start(start)),
            ExecMessage::Word(ExecWord::Resize(TtySize { rows: 1, columns: 2 })),
            ExecMessage::Word(ExecWord::StdinEnd),
            ExecMessage::Word(ExecWord::Ended { exit_code: 137 }),
            ExecMessage::Word(ExecWord::Refused { why: ExecRefusal::NotRunning, message: "gone".to_owned() }),
        ] {
            assert_eq!(ExecMessage::decode(&message.encode()), Ok(message));
        }
    }

    #[test]
    fn what_is_no_message_is_refused_with_what_would_be() {
        let said = |bytes: &[u8]| ExecMessage::decode(bytes).map(drop).expect_err("refused").to_string();
        assert_eq!(said(b""), "not JSON: the message is empty: its first byte says what it is");
        assert!(said(b"\x07x").contains("not 7"), "{}", said(b"\x07x"));
        assert!(said(b"\x03{").starts_with("not JSON"), "{}", said(b"\x03{"));
        let unknown = said(b"\x03{\"start\":{\"command\":[\"ls\"],\"user\":\"root\"}}");
        assert!(unknown.contains("start") && unknown.contains("user"), "{unknown}");
        let number = said(b"\x03{\"start\":{\"command\":\"ls\"}}");
        assert!(number.contains("start.command") && number.contains("an array is expected"), "{number}");
        let long = said(&vec![0; MAX_EXEC_BYTES + 2]);
        assert!(long.contains("65536"), "{long}");
    }
}
