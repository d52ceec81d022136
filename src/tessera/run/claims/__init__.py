"""The claims study: which statements of the papers hold on Fashion-MNIST, with controls and several seeds."""
