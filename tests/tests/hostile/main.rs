//! What a hostile job tries, and what is seen of it: one attack, one test of its name.
//!
//! Each has a control, holds inside, bites once the defence is taken away, and leaves everything as before; see
//! [`attack`] for the order. The table of all is in docs/threat-model.md.

mod attack;
mod attempts;
mod calls;
mod descriptors;
mod layers;
mod leavings;
mod network;
mod paths;
mod proc;
mod product;
mod resources;
mod site;
mod slots;
mod store;
mod tars;
mod verdict;
