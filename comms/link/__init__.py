"""Links between two hosts: what is sent, received, credited, resumed and measured on them."""
