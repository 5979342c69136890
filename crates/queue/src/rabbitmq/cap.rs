//! Keeps a result below what brokers carry: 16 MiB by default since RabbitMQ 4.
//!
//! What is too much is cut from the captured output, before the terminal record is made, so that
//! record and message stay the same bytes; `truncated` says so.

use hutch_proto::{Captured, JobResult};

/// Most bytes of output in one result, all captures together. Escaped as JSON or as base64, and with
/// all else that a result has, it stays below 16 MiB, but for output made of control characters.
const MAX_OUTPUT: usize = 6 << 20;

/// Cuts captured output where there is too much of it: the longest first.
pub(super) fn fit(result: &mut JobResult) {
    let mut captures: Vec<&mut Captured> = vec![&mut result.stdout, &mut result.stderr];
    for step in &mut result.steps {
        captures.extend([&mut step.stdout, &mut step.stderr]);
    }
    let mut total: usize = captures.iter().map(|captured| weight(captured)).sum();
    captures.sort_by_key(|captured| std::cmp::Reverse(weight(captured)));
    for captured in captures {
        if total <= MAX_OUTPUT {
            break;
        }
        let keep = weight(captured).saturating_sub(total - MAX_OUTPUT);
        total -= weight(captured);
        cut(captured, keep);
        total += weight(captured);
    }
}

/// Bytes of a capture in JSON.
fn weight(captured: &Captured) -> usize {
    match str::from_utf8(&captured.data) {
        Ok(text) => text.bytes().map(escaped).sum(),
        Err(_) => captured.data.len().div_ceil(3) * 4,
    }
}

fn escaped(byte: u8) -> usize {
    match byte {
        b'"' | b'\\' | b'\n' | b'\r' | b'\t' | 8 | 12 => 2,
        0..32 => 6,
        _ => 1,
    }
}

/// Keeps as many whole characters, or bytes, as weigh at most `keep`.
fn cut(captured: &mut Captured, keep: usize) {
    let end = match str::from_utf8(&captured.data) {
        Ok(text) => {
            let mut weight = 0;
            let fits = |(_, c): &(usize, char)| {
                weight += u8::try_from(*c).ok().filter(u8::is_ascii).map_or(c.len_utf8(), escaped);
                weight <= keep
            };
            text.char_indices().take_while(fits).last().map_or(0, |(at, c)| at + c.len_utf8())
        }
        Err(_) => keep / 4 * 3,
    };
    captured.data.truncate(end);
    captured.truncated = true;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use hutch_proto::{JobId, Reason, Timestamp};

    use super::*;

    fn result(stdout: Vec<u8>, stderr: Vec<u8>) -> JobResult {
        let now = Timestamp::from_unix_ms(0);
        let mut result =
            JobResult::without_run(JobId::generate(), BTreeMap::new(), now, Reason::HostError, "");
        let captured = |data: Vec<u8>| Captured { bytes: data.len() as u64, data, truncated: false };
        (result.stdout, result.stderr) = (captured(stdout), captured(stderr));
        result
    }

    #[test]
    fn what_fits_is_left_alone() {
        let mut small = result(vec![b'x'; 1 << 20], b"\xff".to_vec());
        let before = small.clone();
        fit(&mut small);
        assert_eq!(small, before);
    }

    #[test]
    fn the_longest_is_cut_and_says_so() {
        for data in
            [vec![b'x'; 64 << 20], vec![0xff; 64 << 20], vec![1; 64 << 20], "é".repeat(8 << 20).into_bytes()]
        {
            let mut large = result(data, b"kept".to_vec());
            fit(&mut large);
            assert!(large.stdout.truncated);
            assert!(!large.stderr.truncated);
            assert_eq!(large.stderr.data, b"kept");
            let json = serde_json::to_vec(&large).unwrap();
            assert!(json.len() < 7 << 20, "{}", json.len());
            assert!(json.len() > 5 << 20, "{}", json.len());
        }
    }
}
