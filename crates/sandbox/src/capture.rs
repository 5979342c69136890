//! What a program writes to one of its streams, as far as it is kept.

use hutch_proto::Captured;

/// How many bytes of each stream are held in memory for one job, all its steps together, whatever its limits are: more
/// is in no result.
pub(crate) const MOST_KEPT: u64 = 16 << 20;

/// Output that is passed on up to the step's limit, and kept up to what is left of the job's share of memory.
#[derive(Debug)]
pub(crate) struct Capture {
    kept: Vec<u8>,
    bytes: u64,
    limit: u64,
    most_kept: u64,
}

impl Capture {
    pub(crate) fn new(limit: u64, most_kept: u64) -> Self {
        Self { kept: Vec::new(), bytes: 0, limit, most_kept: most_kept.min(limit) }
    }

    /// Takes what came and returns the part that is within the limit.
    pub(crate) fn take<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let first = |most: u64, taken: u64| {
            let room = usize::try_from(most.saturating_sub(taken)).unwrap_or(usize::MAX);
            &bytes[..bytes.len().min(room)]
        };
        self.kept.extend_from_slice(first(self.most_kept, self.kept.len() as u64));
        let within = first(self.limit, self.bytes);
        self.bytes += bytes.len() as u64;
        within
    }

    /// How much came.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether more came than the limit allows.
    pub(crate) fn overflowed(&self) -> bool {
        self.bytes > self.limit
    }

    /// What is kept.
    pub(crate) fn done(self) -> Captured {
        let truncated = self.bytes > self.kept.len() as u64;
        Captured { data: self.kept, bytes: self.bytes, truncated }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_passed_on_than_is_kept() {
        let mut capture = Capture::new(6, 4);
        assert_eq!(capture.take(b"abc"), b"abc");
        assert_eq!(capture.take(b"defg"), b"def");
        assert!(capture.overflowed());
        assert_eq!(capture.take(b"h"), b"");
        assert_eq!(capture.done(), Captured { data: b"abcd".to_vec(), bytes: 8, truncated: true });
    }

    #[test]
    fn what_is_within_both_bounds_is_whole() {
        let mut capture = Capture::new(4, 9);
        assert_eq!(capture.take(b"abcd"), b"abcd");
        assert!(!capture.overflowed());
        assert_eq!(capture.done(), Captured { data: b"abcd".to_vec(), bytes: 4, truncated: false });
    }
}
