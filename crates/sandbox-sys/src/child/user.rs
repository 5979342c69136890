//! Who is who in a sandbox: passwd(5) and group(5), parsed in place.
//!
//! These files come from layers that strangers made: a line that is not of the right form is passed
//! over, and nothing is trusted beyond what it says.

use core::ops::Range;

/// A line of passwd(5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User<'a> {
    /// Login name.
    pub name: &'a [u8],
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Home directory.
    pub home: &'a [u8],
}

/// Whom to look for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Key<'a> {
    /// By number.
    Id(u32),
    /// By name.
    Name(&'a [u8]),
}

impl<'a> Key<'a> {
    /// What a text names: digits alone are a number.
    #[must_use]
    pub fn of(text: &'a str) -> Self {
        parse_id(text.as_bytes()).map_or(Self::Name(text.as_bytes()), Key::Id)
    }
}

/// A decimal number, as ids are written.
#[must_use]
pub fn parse_id(text: &[u8]) -> Option<u32> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    text.iter().try_fold(0_u32, |id, digit| id.checked_mul(10)?.checked_add(u32::from(digit - b'0')))
}

fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    file.split(|byte| *byte == b'\n')
}

fn fields<const N: usize>(line: &[u8]) -> Option<[&[u8]; N]> {
    let mut parts = line.split(|byte| *byte == b':');
    let mut all = [&[] as &[u8]; N];
    for field in &mut all {
        *field = parts.next()?;
    }
    parts.next().is_none().then_some(all)
}

/// The first user with this name or number.
#[must_use]
pub fn find_user<'a>(passwd: &'a [u8], key: Key<'_>) -> Option<User<'a>> {
    lines(passwd).find_map(|line| {
        let [name, _, uid, gid, _, home, _] = fields(line)?;
        let user = User { name, uid: parse_id(uid)?, gid: parse_id(gid)?, home };
        let found = match key {
            Key::Id(id) => user.uid == id,
            Key::Name(name) => user.name == name,
        };
        (found && !name.is_empty()).then_some(user)
    })
}

/// Where the line is of a user that hutch entered, if there is one: of the host layer, or of the job that made a layer.
#[must_use]
pub fn made_user(passwd: &[u8]) -> Option<Range<usize>> {
    place_of(passwd, |line| {
        matches!(fields(line), Some([b"job", b"x", _, _, b"job", b"/home/job", b"/bin/sh"]))
    })
}

/// As [`made_user`], of a group.
#[must_use]
pub fn made_group(group: &[u8]) -> Option<Range<usize>> {
    place_of(group, |line| matches!(fields(line), Some([b"job", b"x", _, b""])))
}

/// Where the first such line is, with its end; one that has no end is none that hutch wrote.
fn place_of(file: &[u8], wanted: impl Fn(&[u8]) -> bool) -> Option<Range<usize>> {
    let mut start = 0;
    for line in file.split_inclusive(|byte| *byte == b'\n') {
        let end = start + line.len();
        if line.strip_suffix(b"\n").is_some_and(&wanted) {
            return Some(start..end);
        }
        start = end;
    }
    None
}

/// The id of the first group with this name or number.
#[must_use]
pub fn find_group(group: &[u8], key: Key<'_>) -> Option<u32> {
    lines(group).find_map(|line| {
        let [name, _, gid, _] = fields(line)?;
        let gid = parse_id(gid)?;
        let found = match key {
            Key::Id(id) => gid == id,
            Key::Name(wanted) => name == wanted,
        };
        found.then_some(gid)
    })
}

/// Fills `groups` with the ids of the groups that list this user, and says how many they are. Ids from `end` on are
/// left out.
#[must_use]
pub fn groups_of(group: &[u8], user: &[u8], end: u32, groups: &mut [u32]) -> usize {
    let listed = lines(group).filter_map(|line| {
        let [_, _, gid, members] = fields(line)?;
        let member = members.split(|byte| *byte == b',').any(|member| member == user);
        member.then(|| parse_id(gid)).flatten().filter(|gid| *gid < end)
    });
    let mut count = 0;
    for (place, gid) in groups.iter_mut().zip(listed) {
        *place = gid;
        count += 1;
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\nbroken\n:x:7:7::/:/x\nann:x:12:34:Ann:/srv/ann:/bin/sh\nbig:x:99999999999:1::/:/\n";
    const GROUP: &[u8] = b"root:x:0:\nstaff:x:50:ann,bob\nannex:x:51:joann\naudio:x:29:bob,ann";

    #[test]
    fn users_are_found_by_name_and_number() {
        let ann = find_user(PASSWD, Key::of("ann")).expect("ann");
        assert_eq!((ann.uid, ann.gid, ann.home), (12, 34, &b"/srv/ann"[..]));
        assert_eq!(find_user(PASSWD, Key::of("12")), Some(ann));
        assert_eq!(find_user(PASSWD, Key::of("an")), None);
        assert_eq!(find_user(PASSWD, Key::of("7")), None, "a user without a name is none");
        assert_eq!(find_user(PASSWD, Key::of("big")), None, "a uid that is too large is none");
        assert_eq!(find_user(b"", Key::Id(0)), None);
    }

    #[test]
    fn what_hutch_entered_is_told_from_what_a_layer_says() {
        let passwd = b"root:x:0:0::/root:/bin/sh\njob:x:1001:1001:job:/home/job:/bin/sh\nann:x:1:1::/:/x\n";
        let place = made_user(passwd).expect("made");
        assert_eq!(&passwd[place], b"job:x:1001:1001:job:/home/job:/bin/sh\n");
        for other in ["job:x:5:5:Job Smith:/home/job:/bin/sh\n", "job:x:5:5:job:/srv:/bin/sh\n", "", "job"] {
            assert_eq!(made_user(other.as_bytes()), None, "{other}");
        }
        assert_eq!(made_group(b"root:x:0:\njob:x:1001:\n"), Some(10..22));
        assert_eq!(made_group(b"job:x:50:ann\n"), None);
    }

    #[test]
    fn groups_are_those_that_list_the_user() {
        assert_eq!(find_group(GROUP, Key::of("staff")), Some(50));
        assert_eq!(find_group(GROUP, Key::of("29")), Some(29));
        assert_eq!(find_group(GROUP, Key::of("none")), None);
        let mut groups = [0; 8];
        assert_eq!(groups_of(GROUP, b"ann", 65_536, &mut groups), 2);
        assert_eq!(groups[..2], [50, 29]);
        let mut few = [0; 1];
        assert_eq!(groups_of(GROUP, b"ann", 65_536, &mut few), 1, "no more than fit");
        assert_eq!(groups_of(GROUP, b"ann", 40, &mut groups), 1);
        assert_eq!(groups[0], 29, "an id that the sandbox does not have is left out");
    }
}
