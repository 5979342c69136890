//! Server-sent events, as they come over the wire (the WHATWG's HTML standard, section 9.2).

/// One event.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Message {
    /// Its id, where it has one.
    pub(crate) id: Option<String>,
    /// Its data.
    pub(crate) data: String,
}

/// The most bytes of one line; what is longer is an error.
const MOST: usize = 4 << 20;

/// Puts events together from bytes.
#[derive(Debug, Default)]
pub(crate) struct Parser {
    line: Vec<u8>,
    message: Message,
}

impl Parser {
    /// Takes the next bytes; returns the events that are whole now, or none if a line has no end.
    pub(crate) fn feed(&mut self, bytes: &[u8]) -> Option<Vec<Message>> {
        let mut whole = Vec::new();
        for &byte in bytes {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > MOST {
                    return None;
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let line = String::from_utf8_lossy(&line);
            if let Some(message) = self.take(line.trim_end_matches('\r')) {
                whole.push(message);
            }
        }
        Some(whole)
    }

    fn take(&mut self, line: &str) -> Option<Message> {
        if line.is_empty() {
            let message = std::mem::take(&mut self.message);
            return (!message.data.is_empty()).then_some(message);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "id" => self.message.id = Some(value.to_owned()),
            "data" => {
                if !self.message.data.is_empty() {
                    self.message.data.push('\n');
                }
                self.message.data.push_str(value);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_put_together_from_any_pieces() {
        let wire = b": hello\n\nid: 1.2\nevent: stdout\ndata: {\"a\":\ndata: 1}\n\nid:1.3\r\ndata:x\r\n\r\n";
        for size in 1..wire.len() {
            let mut parser = Parser::default();
            let messages: Vec<Message> =
                wire.chunks(size).flat_map(|piece| parser.feed(piece).expect("short")).collect();
            assert_eq!(
                messages,
                [
                    Message { id: Some("1.2".to_owned()), data: "{\"a\":\n1}".to_owned() },
                    Message { id: Some("1.3".to_owned()), data: "x".to_owned() },
                ]
            );
        }
    }

    #[test]
    fn a_line_without_an_end_is_refused() {
        assert!(Parser::default().feed(&vec![b'x'; MOST + 1]).is_none());
    }
}
