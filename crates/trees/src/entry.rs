//! One entry of a layer's tar, with every header that belongs to it.
//!
//! The tar is read raw: the extension headers of PAX (pax(1)) and GNU tar are taken apart here, each within a cap, so
//! that no name or attribute can be larger than what a file system would take. Where two headers
//! disagree on a size, the layer is refused: readers that trust one or the other would see different trees.

use std::io::Read;

use tar::EntryType;

/// The largest extension header.
const MOST_EXTENSION_BYTES: u64 = 1 << 20;
/// The longest path: PATH_MAX, less the NUL.
const MOST_PATH_BYTES: usize = 4095;

/// What an entry makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    File {
        size: u64,
    },
    Dir,
    Symlink(Vec<u8>),
    HardLink(Vec<Vec<u8>>),
    Fifo,
    /// A device: never made.
    Device,
}

/// An entry, its path taken apart.
#[derive(Debug, Clone)]
pub(crate) struct Item {
    /// Names from the root on; none for the root itself.
    pub(crate) path: Vec<Vec<u8>>,
    pub(crate) kind: Kind,
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Seconds since 1970, and nanoseconds.
    pub(crate) mtime: (i64, u32),
    /// Extended attributes of the name space `user`, without those that overlayfs reads.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What the extension headers said so far of the entry that follows them.
#[derive(Debug, Default)]
pub(crate) struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    uid: Option<u32>,
    gid: Option<u32>,
    mtime: Option<(i64, u32)>,
    size: Option<u64>,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What a raw entry was.
pub(crate) enum Read1 {
    /// A header of the next entry: read, and kept.
    Extension,
    /// An entry.
    Item(Item),
}

impl Extensions {
    /// Reads one raw entry.
    ///
    /// # Errors
    /// A sentence that says what is wrong with it.
    pub(crate) fn read<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>) -> Result<Read1, String> {
        let size = entry.header().entry_size().map_err(|e| format!("no size: {e}"))?;
        match entry.header().entry_type() {
            EntryType::XHeader => {
                let bytes = whole(entry, size)?;
                self.pax(&bytes)?;
                return Ok(Read1::Extension);
            }
            // What is said of all entries matters to nothing that a layer keeps.
            EntryType::XGlobalHeader => {
                whole(entry, size)?;
                return Ok(Read1::Extension);
            }
            EntryType::GNULongName => {
                self.path = Some(until_nul(whole(entry, size)?));
                return Ok(Read1::Extension);
            }
            EntryType::GNULongLink => {
                self.link = Some(until_nul(whole(entry, size)?));
                return Ok(Read1::Extension);
            }
            _ => {}
        }
        let extensions = std::mem::take(self);
        extensions.item(entry.header(), size).map(Read1::Item)
    }

    fn item(self, header: &tar::Header, size: u64) -> Result<Item, String> {
        if self.size.is_some_and(|stated| stated != size) {
            return Err("its headers disagree on its size".to_owned());
        }
        let link = self.link.or_else(|| header.link_name_bytes().map(std::borrow::Cow::into_owned));
        let target = || link.clone().filter(|link| !link.is_empty()).ok_or("a link without a target");
        let kind = match header.entry_type() {
            EntryType::Regular | EntryType::Continuous => Kind::File { size },
            EntryType::Directory => Kind::Dir,
            EntryType::Symlink => {
                let target = target()?;
                if target.len() > MOST_PATH_BYTES || target.contains(&0) {
                    return Err("a target that no link can have".to_owned());
                }
                Kind::Symlink(target)
            }
            EntryType::Link => Kind::HardLink(names(&target()?)?),
            EntryType::Fifo => Kind::Fifo,
            EntryType::Char | EntryType::Block => Kind::Device,
            other => {
                return Err(format!(
                    "entries of the type {:?} are not supported",
                    char::from(other.as_byte())
                ));
            }
        };
        if size != 0 && !matches!(kind, Kind::File { .. }) {
            return Err("only a file may have content".to_owned());
        }
        let path = self.path.unwrap_or_else(|| header.path_bytes().into_owned());
        // Old archives tell a directory by the slash at the end of its name.
        let kind = match kind {
            Kind::File { size: 0 } if path.ends_with(b"/") => Kind::Dir,
            kind => kind,
        };
        let id = |given: Option<u32>, blank: &[u8], field: std::io::Result<u64>| match (given, field) {
            (Some(id), _) => Ok(id),
            (None, Ok(id)) => u32::try_from(id).map_err(|_| "an owner that is no id"),
            // Left empty, it is 0, as to other readers.
            (None, Err(_)) if blank.iter().all(|byte| matches!(byte, 0 | b' ')) => Ok(0),
            (None, Err(_)) => Err("an owner that is no id"),
        };
        let seconds = || header.mtime().ok().and_then(|mtime| i64::try_from(mtime).ok()).unwrap_or(0);
        Ok(Item {
            path: names(&path)?,
            kind,
            mode: header.mode().map_err(|e| format!("no mode: {e}"))? & 0o7777,
            uid: id(self.uid, &header.as_old().uid, header.uid())?,
            gid: id(self.gid, &header.as_old().gid, header.gid())?,
            mtime: self.mtime.unwrap_or_else(|| (seconds(), 0)),
            xattrs: self.xattrs,
        })
    }

    /// The records of a PAX header: `LENGTH KEY=VALUE\n`, the length counting itself.
    fn pax(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        while !bytes.is_empty() {
            let (record, rest) = pax_record(bytes).ok_or("a PAX header that is not well-formed")?;
            let (key, value) = record;
            bytes = rest;
            self.keep(key, value)?;
        }
        Ok(())
    }

    fn keep(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        let text = || std::str::from_utf8(value).map_err(|_| "a PAX value that is no text".to_owned());
        let number = |text: &str| text.parse().map_err(|_| "a PAX value that is no number".to_owned());
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"uid" => self.uid = Some(number(text()?)?),
            b"gid" => self.gid = Some(number(text()?)?),
            b"size" => self.size = Some(text()?.parse().map_err(|_| "a size that is no number")?),
            b"mtime" => self.mtime = Some(pax_time(text()?).ok_or("a time that is no time")?),
            key if key.starts_with(b"GNU.sparse.") => {
                return Err("sparse archives are not supported: make it without --sparse".to_owned());
            }
            key => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.")
                    && name.starts_with(b"user.")
                    && !name.starts_with(b"user.overlay.")
                    && name.len() <= 255
                    && !name.contains(&0)
                {
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Ok(())
    }
}

type Record<'a> = (&'a [u8], &'a [u8]);

fn pax_record(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = bytes.iter().take(20).position(|byte| *byte == b' ')?;
    let length: usize = std::str::from_utf8(&bytes[..space]).ok()?.parse().ok()?;
    let record = bytes.get(space + 1..length)?.strip_suffix(b"\n")?;
    let equals = record.iter().position(|byte| *byte == b'=')?;
    Some(((&record[..equals], &record[equals + 1..]), &bytes[length..]))
}

/// `SECONDS[.FRACTION]`, as PAX has it.
fn pax_time(text: &str) -> Option<(i64, u32)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    let whole: i64 = seconds.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let nanos: u32 = format!("{fraction:0<9}").get(..9)?.parse().ok()?;
    // The fraction of a time before 1970 counts backwards.
    match (seconds.starts_with('-'), nanos) {
        (true, 1..) => Some((whole - 1, 1_000_000_000 - nanos)),
        _ => Some((whole, nanos)),
    }
}

/// A path's names; empty ones and `.` are nothing, `..` is refused.
fn names(path: &[u8]) -> Result<Vec<Vec<u8>>, String> {
    if path.len() > MOST_PATH_BYTES {
        return Err(format!("a path of {} bytes; {MOST_PATH_BYTES} are possible", path.len()));
    }
    let mut names = Vec::new();
    for name in path.split(|byte| *byte == b'/') {
        match name {
            b"" | b"." => {}
            b".." => return Err("a path with `..` in it".to_owned()),
            name if name.contains(&0) => return Err("a path with a NUL byte in it".to_owned()),
            name => names.push(name.to_vec()),
        }
    }
    Ok(names)
}

fn whole<R: Read>(entry: &mut tar::Entry<'_, R>, size: u64) -> Result<Vec<u8>, String> {
    if size > MOST_EXTENSION_BYTES {
        return Err(format!("an extension header of {size} bytes; {MOST_EXTENSION_BYTES} are allowed"));
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(|e| format!("breaks off: {e}"))?;
    Ok(bytes)
}

fn until_nul(mut bytes: Vec<u8>) -> Vec<u8> {
    if let Some(end) = bytes.iter().position(|byte| *byte == 0) {
        bytes.truncate(end);
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pax_records_may_hold_newlines() {
        let bytes = b"27 SCHILY.xattr.user.a=x\ny\n12 path=abc\n";
        let ((key, value), rest) = pax_record(bytes).expect("record");
        assert_eq!((key, value), (&b"SCHILY.xattr.user.a"[..], &b"x\ny"[..]));
        assert_eq!(pax_record(rest).expect("record").0, (&b"path"[..], &b"abc"[..]));
        for wrong in [&b"5 a=b\n"[..], b"99 a=b\n", b"x a=b\n", b"6 a=bx", b"0 a=b\n"] {
            assert!(pax_record(wrong).is_none(), "{wrong:?}");
        }
    }

    #[test]
    fn times_have_fractions_and_may_be_before_1970() {
        assert_eq!(pax_time("1.5"), Some((1, 500_000_000)));
        assert_eq!(pax_time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time("7"), Some((7, 0)));
        assert_eq!(pax_time("1.0000000019"), Some((1, 1)));
        assert!(pax_time("1.x").is_none() && pax_time("").is_none());
    }

    #[test]
    fn names_leave_out_what_leads_nowhere() {
        assert_eq!(names(b"/./a//b/").expect("names"), [b"a".to_vec(), b"b".to_vec()]);
        assert!(names(b"a/../b").is_err() && names(b"a\0b").is_err());
        assert!(names(b"./").expect("root").is_empty());
    }
}
