"""A recovered VM as QEMU or libvirt is told to start it. Pure, but for the probe of KVM: starting it is another's business."""
