//! The bytes of a layer: decompressed, hashed and counted on their way.
//!
//! The compression is told from the first bytes, whatever a manifest says of it: gzip (RFC 1952), zstd (RFC 8878), or
//! none. A reader that has given its cap of bytes fails, so that no bomb grows beyond it.

use std::io::{self, BufReader, Read};

use flate2::bufread::MultiGzDecoder;
use sha2::{Digest as _, Sha256};

/// The largest window of a zstd frame that is decompressed, as a power of two: what `zstd --long` makes.
const WINDOW_LOG: u32 = 27;

/// Says that the cap of bytes was reached.
#[derive(Debug, thiserror::Error)]
#[error("more than {0} bytes")]
pub(crate) struct OverCap(pub(crate) u64);

/// Decompresses what is compressed, and passes on what is not.
///
/// # Errors
/// If the first bytes cannot be read.
pub fn decompressed<'r>(blob: impl Read + 'r) -> io::Result<Box<dyn Read + 'r>> {
    let mut head = Vec::with_capacity(4);
    let mut blob = BufReader::with_capacity(128 << 10, blob);
    (&mut blob).take(4).read_to_end(&mut head)?;
    let whole = BufReader::new(io::Cursor::new(head.clone()).chain(blob));
    Ok(match head.as_slice() {
        [0x1f, 0x8b, ..] => Box::new(MultiGzDecoder::new(whole)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let mut decoder = zstd::Decoder::with_buffer(whole)?;
            decoder.window_log_max(WINDOW_LOG)?;
            Box::new(decoder)
        }
        _ => Box::new(whole),
    })
}

/// Hashes and counts what is read through it, up to a cap.
pub(crate) struct Counted<R> {
    inner: R,
    hash: Sha256,
    bytes: u64,
    most: u64,
}

impl<R: Read> Counted<R> {
    pub(crate) fn new(inner: R, most: u64) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0, most }
    }

    /// Reads what is left, and says the digest and the size of it all.
    pub(crate) fn finish(mut self) -> io::Result<([u8; 32], u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((self.hash.finalize().into(), self.bytes))
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        self.bytes += count as u64;
        if self.bytes > self.most {
            return Err(io::Error::other(OverCap(self.most)));
        }
        Ok(count)
    }
}
