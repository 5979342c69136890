//! What a job with `network: "egress"` may reach, as rules for nftables(8).
//!
//! In this order, the first that fits decides: loopback, pasta itself and the name server are reached; what the config denies is not;
//! what it allows is; this host's own addresses are not, nor anything that is not of the public internet (the registries
//! of special-purpose addresses, RFC 6890; the address of Azure's metadata besides); all else is.

use std::fmt;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

/// Where names are asked for, inside.
pub(super) const NAME_SERVER: &str = "10.0.2.3";

/// Not of the public internet: IANA's registry of special-purpose addresses, multicast, and Azure's metadata service,
/// whose address is a public one.
const SPECIAL_V4: &str = "0.0.0.0/8, 10.0.0.0/8, 100.64.0.0/10, 127.0.0.0/8, 168.63.129.16, 169.254.0.0/16, 172.16.0.0/12, \
                          192.0.0.0/24, 192.0.2.0/24, 192.88.99.0/24, 192.168.0.0/16, 198.18.0.0/15, 198.51.100.0/24, \
                          203.0.113.0/24, 224.0.0.0/3";
/// What is of the public internet, and what is not in spite of it: addresses that stand for others' (Teredo, 6to4), which
/// may be private, and documentation.
const GLOBAL_V6: &str = "2000::/3";
const SPECIAL_V6: &str = "2001::/23, 2001:db8::/32, 2002::/16, 3fff::/20";

/// Addresses, and perhaps one port of theirs: `10.1.0.0/16`, `10.1.2.3:443`, `[fd00::/8]:443`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EgressRule {
    net: IpNet,
    port: Option<u16>,
}

/// A rule that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no destination: addresses such as 10.1.0.0/16, 10.1.2.3:443 or [fd00::/8]:443 are expected"
)]
pub struct EgressRuleError(String);

impl FromStr for EgressRule {
    type Err = EgressRuleError;

    fn from_str(text: &str) -> Result<Self, EgressRuleError> {
        let wrong = || EgressRuleError(text.to_owned());
        let (addresses, port) =
            match text.strip_prefix('[').map(|rest| rest.split_once(']').ok_or_else(wrong)) {
                Some(parts) => {
                    let (addresses, rest) = parts?;
                    let port =
                        if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or_else(wrong)?) };
                    (addresses, port)
                }
                // An address of the sixth version has colons of its own.
                None if text.matches(':').count() == 1 => {
                    let (addresses, port) = text.split_once(':').ok_or_else(wrong)?;
                    (addresses, Some(port))
                }
                None => (text, None),
            };
        let net = addresses
            .parse::<IpNet>()
            .or_else(|_| addresses.parse::<IpAddr>().map(IpNet::from))
            .map_err(|_| wrong())?;
        let port = port.map(str::parse).transpose().map_err(|_| wrong())?;
        Ok(Self { net: net.trunc(), port })
    }
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.net, self.port) {
            (net, None) => write!(f, "{net}"),
            (IpNet::V4(net), Some(port)) => write!(f, "{net}:{port}"),
            (IpNet::V6(net), Some(port)) => write!(f, "[{net}]:{port}"),
        }
    }
}

/// How jobs with `network: "egress"` are treated.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EgressConfig {
    /// Whether there may be any.
    pub enabled: bool,
    /// What they reach although it is not of the public internet.
    pub allow: Vec<EgressRule>,
    /// What they do not reach, whatever else is said.
    pub deny: Vec<EgressRule>,
}

impl Default for EgressConfig {
    fn default() -> Self {
        Self { enabled: true, allow: Vec::new(), deny: Vec::new() }
    }
}

/// The rules for one job, given this host's own addresses.
pub(super) fn ruleset(config: &EgressConfig, own: &[IpAddr]) -> String {
    let mut rules = String::new();
    let mut rule = |text: &str| {
        // Writing to a string does not fail.
        let _ = writeln!(rules, "{text}");
    };
    rule("oif lo accept");
    // pasta is asked where everything is: neighbour discovery, RFC 4861.
    rule("icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert } accept");
    for protocol in ["udp", "tcp"] {
        rule(&format!("ip daddr {NAME_SERVER} {protocol} dport 53 accept"));
    }
    for denied in &config.deny {
        rule(&format!("{} reject", destination(denied)));
    }
    for allowed in &config.allow {
        rule(&format!("{} accept", destination(allowed)));
    }
    for address in own {
        rule(&format!("{} reject", destination(&EgressRule { net: IpNet::from(*address), port: None })));
    }
    rule(&format!("ip daddr {{ {SPECIAL_V4} }} reject"));
    rule(&format!("ip6 daddr {{ {SPECIAL_V6} }} reject"));
    rule("meta nfproto ipv4 accept");
    rule(&format!("ip6 daddr {GLOBAL_V6} accept"));
    rule("reject");
    format!(
        "table inet hutch {{\nchain output {{\ntype filter hook output priority filter; policy drop;\n{rules}}}\n}}\n"
    )
}

fn destination(rule: &EgressRule) -> String {
    let family = if matches!(rule.net, IpNet::V4(_)) { "ip" } else { "ip6" };
    match rule.port {
        Some(port) => format!("{family} daddr {} meta l4proto {{ tcp, udp }} th dport {port}", rule.net),
        None => format!("{family} daddr {}", rule.net),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_read_as_they_are_shown() {
        for text in ["10.1.0.0/16", "10.1.2.3/32:443", "[fd00::/8]:443", "fd00::/8", "0.0.0.0/0:80"] {
            assert_eq!(text.parse::<EgressRule>().map(|rule| rule.to_string()).as_deref(), Ok(text));
        }
        assert_eq!(
            "10.1.2.3".parse::<EgressRule>().map(|rule| rule.to_string()).as_deref(),
            Ok("10.1.2.3/32")
        );
        assert_eq!(
            "10.1.2.3/8:1".parse::<EgressRule>().map(|rule| rule.to_string()).as_deref(),
            Ok("10.0.0.0/8:1")
        );
        for wrong in [
            "",
            "example.org",
            "10.0.0.0/33",
            "10.0.0.1:http",
            "[::1",
            "[::1]443",
            "1.2.3.4 accept",
            "::1; drop",
        ] {
            let error = wrong.parse::<EgressRule>().expect_err(wrong).to_string();
            assert!(error.contains(wrong) && error.contains("10.1.2.3:443"), "{error}");
        }
    }

    #[test]
    fn what_is_denied_comes_before_what_is_allowed_and_that_before_the_rest() {
        let config = EgressConfig {
            enabled: true,
            allow: vec!["10.0.0.0/8:443".parse().expect("a rule")],
            deny: vec!["93.184.216.34".parse().expect("a rule")],
        };
        let rules = ruleset(&config, &["198.51.100.7".parse().expect("an address")]);
        let places: Vec<_> = [
            "93.184.216.34/32 reject",
            "th dport 443 accept",
            "198.51.100.7/32 reject",
            "10.0.0.0/8, 100.64",
            "nfproto ipv4 accept",
        ]
        .iter()
        .map(|text| rules.find(text).unwrap_or_else(|| panic!("{text}: {rules}")))
        .collect();
        assert!(places.is_sorted(), "{rules}");
    }
}
